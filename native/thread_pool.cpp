#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "openmp.h"
#include "seats.h"

namespace anybit {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr microseconds kPatient{100};  // how long a worker looks for the next job before it sleeps
constexpr microseconds kHasty{20};     // and how long the caller looks whether the last blocks are done
constexpr std::size_t kBlocksPerThread = 4;  // enough that a slow core does less, few enough that claims cost nothing

constexpr int kLooks = 128;  // 1 to 5 microseconds between two offers of the core to others

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks at `word` for a few microseconds: whether it differs from `old`.
bool changed(const std::atomic<std::uint32_t>& word, std::uint32_t old) {
  for (int look = 0; look < kLooks; ++look) {
    if (word.load(std::memory_order_acquire) != old) return true;
    pause();
  }
  return false;
}

// Returns once `word` differs from `old`: looks for `spin`, giving the core away now and then, and sleeps after that; false when
// it slept.
bool await_change(const std::atomic<std::uint32_t>& word, std::uint32_t old, microseconds spin) {
  const auto start = Clock::now();
  while (!changed(word, old)) {
    sched_yield();
    if (Clock::now() - start < spin) continue;
    word.wait(old, std::memory_order_acquire);
    return false;
  }
  return true;
}

// Blocks [begin, end) that one thread should do, both in one word; others take from the end when they have done their own. Alone
// on its cache line: taking from one's own share costs a few nanoseconds.
class alignas(64) Share {
 public:
  void fill(std::uint64_t begin, std::uint64_t end) { range_.store(end << 32 | begin, std::memory_order_release); }

  bool take(bool own, std::size_t& block) {
    auto range = range_.load(std::memory_order_acquire);
    while (true) {
      const std::uint64_t begin = range & 0xFFFFFFFFu, end = range >> 32;
      if (begin >= end) return false;
      block = own ? begin : end - 1;
      const auto rest = own ? range + 1 : range - (std::uint64_t{1} << 32);
      if (range_.compare_exchange_weak(range, rest, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
    }
  }

 private:
  std::atomic<std::uint64_t> range_{0};
};

thread_local bool own_workers = false;

// A job is a number of blocks of rows, dealt out in shares; whoever is awake takes blocks, and `unfinished_` says when all are
// done. The caller works too and waits for taken blocks only: a worker that the system wakes late, because a neighbour holds its
// core, costs nothing. OpenMP's team, where that does a job, is waited for whole.
class Pool {
 public:
  explicit Pool(int count) : count_(static_cast<std::size_t>(count)), seats_(count), shares_(count_) {
    for (int id = 1; id < count; ++id) workers_.emplace_back([this, id] { work(id); });
  }

  ~Pool() {
    ending_ = true;
    announce();
    for (auto& worker : workers_) worker.join();
  }

  int count() const { return static_cast<int>(count_); }

  void run(std::size_t items, std::size_t grain, Task task, void* context) {
    const std::size_t grains = (items + grain - 1) / grain;
    const std::size_t block = (grains + count_ * kBlocksPerThread - 1) / (count_ * kBlocksPerThread) * grain;
    if (count_ == 1 || items <= block || busy_.test_and_set(std::memory_order_acquire)) return task(context, 0, items);
    const std::size_t blocks = (items + block - 1) / block;
    items_ = items, block_ = block, task_ = task, context_ = context;
    unfinished_.store(static_cast<std::uint32_t>(blocks), std::memory_order_relaxed);
    for (std::size_t id = 0; id < count_; ++id) shares_[id].fill(blocks * id / count_, blocks * (id + 1) / count_);
    if (const OpenMp* openmp = own_workers ? nullptr : OpenMp::loaded(); openmp && openmp->threads() == count())
      run_team(*openmp);
    else
      run_workers();
    busy_.clear(std::memory_order_release);
    busy_.notify_all();
  }

  void wait_idle() { busy_.wait(true); }

 private:
  void run_team(const OpenMp& openmp) {
    members_.store(0, std::memory_order_relaxed);
    openmp.run([](void* pool) { static_cast<Pool*>(pool)->run_member(); }, this, count());
  }

  void run_member() { run_blocks(members_.fetch_add(1, std::memory_order_relaxed)); }

  void run_workers() {
    seats_.sit(0);
    announce();
    run_blocks(0);
    for (auto left = unfinished_.load(std::memory_order_acquire); left; left = unfinished_.load(std::memory_order_acquire))
      await_change(unfinished_, left, kHasty);
  }

  void announce() {
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();
  }

  // The job's description is read only with a taken block in hand: until that is reported finished it cannot change.
  void run_blocks(std::size_t id) {
    std::uint32_t done = 0;
    for (std::size_t turn = 0, block; turn < count_; ++turn)
      while (shares_[(id + turn) % count_].take(turn == 0, block)) {
        task_(context_, block * block_, std::min(items_, (block + 1) * block_));
        ++done;
      }
    if (done && unfinished_.fetch_sub(done, std::memory_order_acq_rel) == done) unfinished_.notify_one();
  }

  void work(int id) {
    for (std::uint32_t seen = 0; true; seats_.spread(id)) {
      // A neighbour who waits for this core gets it now, while no block is in hand that the caller would have to wait for.
      if (job_.load(std::memory_order_relaxed) == seen) sched_yield();
      if (!await_change(job_, seen, kPatient)) seats_.spread(id);
      seen = job_.load(std::memory_order_acquire);
      if (ending_) return;
      run_blocks(static_cast<std::size_t>(id));
    }
  }

  const std::size_t count_;
  Seats seats_;
  std::vector<Share> shares_;
  std::atomic<std::size_t> members_{0};
  std::atomic_flag busy_;
  alignas(64) std::atomic<std::uint32_t> job_{0};
  std::atomic<bool> ending_{false};
  std::size_t items_ = 0, block_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> unfinished_{0};
  std::vector<std::thread> workers_;
};

int default_threads() {
  if (const char* text = std::getenv("ANYBIT_THREADS")) {
    char* end = nullptr;
    const long count = std::strtol(text, &end, 10);
    if (end == text || *end || count < 1 || count > 256)
      throw std::invalid_argument("ANYBIT_THREADS='" + std::string(text) + "' is not a number from 1 to 256");
    return static_cast<int>(count);
  }
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::clamp(CPU_COUNT(&allowed), 1, 256);
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 256);
}

// Never destroyed: workers asleep at exit end with the process, and a forked child (which has no workers) starts afresh.
std::shared_ptr<Pool>* current = nullptr;
std::mutex* guard = new std::mutex;
int wanted = 0;

std::shared_ptr<Pool> pool() {
  std::lock_guard lock(*guard);
  if (!current) {
    [[maybe_unused]] static const int once = pthread_atfork(nullptr, nullptr, [] {
      current = nullptr;
      guard = new std::mutex;
    });
    if (!wanted) wanted = default_threads();
    current = new std::shared_ptr<Pool>(std::make_shared<Pool>(wanted));
  }
  return *current;
}

}  // namespace

OwnWorkers::OwnWorkers() : before_(own_workers) { own_workers = true; }
OwnWorkers::~OwnWorkers() { own_workers = before_; }

void parallel_for(std::size_t items, std::size_t grain, Task task, void* context) {
  if (items) pool()->run(items, grain, task, context);
}

int threads() { return pool()->count(); }

void set_threads(int count) {
  if (count < 1 || count > 256) throw std::invalid_argument("threads must be 1 to 256, got " + std::to_string(count));
  const auto old = pool();
  if (old->count() == count) return;
  old->wait_idle();
  std::lock_guard lock(*guard);
  wanted = count;
  *current = std::make_shared<Pool>(count);  // the old pool ends its workers when its last user lets go
}

}  // namespace anybit
