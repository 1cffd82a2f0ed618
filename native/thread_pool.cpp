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

namespace anybit {
namespace {

constexpr auto kSpin = std::chrono::microseconds(20);
constexpr std::size_t kBlocksPerThread = 4;  // enough that a slow core does less, few enough that claims cost nothing

// Returns once `word` differs from `old`: looks often for kSpin, giving the core away now and then, and sleeps after that.
void await_change(const std::atomic<std::uint32_t>& word, std::uint32_t old) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  for (int turn = 1; word.load(std::memory_order_acquire) == old; ++turn) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (turn % 64) continue;
    sched_yield();
    if (std::chrono::steady_clock::now() > deadline) {
      word.wait(old, std::memory_order_acquire);
      return;
    }
  }
}

// A job is `blocks_` stretches of rows; whoever is awake claims the next one by lowering `unclaimed_`, and `unfinished_` says
// when all are done. The caller works too and waits for claimed blocks only: a worker that the system wakes late, because a
// neighbour holds its core, costs nothing.
class Pool {
 public:
  explicit Pool(int count) : count_(count) {
    for (int id = 1; id < count; ++id) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    task_ = nullptr;
    publish(workers_.size());  // one last block each, that ends it
    for (auto& worker : workers_) worker.join();
  }

  int count() const { return count_; }

  void run(std::size_t items, std::size_t grain, Task task, void* context) {
    const std::size_t grains = (items + grain - 1) / grain;
    const std::size_t block = (grains + count_ * kBlocksPerThread - 1) / (count_ * kBlocksPerThread) * grain;
    std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock || count_ == 1 || items <= block) return task(context, 0, items);
    items_ = items, block_ = block, blocks_ = (items + block - 1) / block, task_ = task, context_ = context;
    unfinished_.store(static_cast<std::uint32_t>(blocks_), std::memory_order_relaxed);
    publish(blocks_);
    run_blocks();
    for (auto left = unfinished_.load(std::memory_order_acquire); left; left = unfinished_.load(std::memory_order_acquire))
      await_change(unfinished_, left);
  }

  void wait_idle() { std::lock_guard lock(busy_); }

 private:
  void publish(std::size_t blocks) {
    unclaimed_.store(static_cast<std::uint32_t>(blocks), std::memory_order_release);
    unclaimed_.notify_all();
  }

  // False when the pool ends. The job's description is read only under a claim: until that block is finished it cannot change.
  bool run_blocks() {
    auto left = unclaimed_.load(std::memory_order_relaxed);
    while (left) {
      if (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_relaxed)) continue;
      if (!task_) return false;
      const std::size_t begin = (blocks_ - left) * block_;
      task_(context_, begin, std::min(items_, begin + block_));
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
      left = unclaimed_.load(std::memory_order_relaxed);
    }
    return true;
  }

  void work() {
    do await_change(unclaimed_, 0);
    while (run_blocks());
  }

  int count_;
  std::vector<std::thread> workers_;
  std::mutex busy_;
  std::size_t items_ = 0, block_ = 0, blocks_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> unclaimed_{0};
  alignas(64) std::atomic<std::uint32_t> unfinished_{0};
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
