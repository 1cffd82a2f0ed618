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

class Pool {
 public:
  explicit Pool(int count) : count_(count) {
    for (int id = 1; id < count; ++id) workers_.emplace_back([this, id] { work(id); });
  }

  ~Pool() {
    task_ = nullptr;
    publish();
    for (auto& worker : workers_) worker.join();
  }

  int count() const { return count_; }

  void run(std::size_t items, std::size_t grain, Task task, void* context) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock || count_ == 1 || items <= grain) return task(context, 0, items);
    items_ = items, grain_ = grain, task_ = task, context_ = context;
    pending_.store(static_cast<std::uint32_t>(count_ - 1), std::memory_order_relaxed);
    publish();
    run_share(0);
    for (auto left = pending_.load(std::memory_order_acquire); left; left = pending_.load(std::memory_order_acquire))
      await_change(pending_, left);
  }

  void wait_idle() { std::lock_guard lock(busy_); }

 private:
  void publish() {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }

  void run_share(int id) {
    const std::size_t blocks = (items_ + grain_ - 1) / grain_;
    const std::size_t begin = blocks * id / count_ * grain_;
    const std::size_t end = std::min(items_, blocks * (id + 1) / count_ * grain_);
    if (begin < end) task_(context_, begin, end);
  }

  void work(int id) {
    for (std::uint32_t seen = 0;; ++seen) {
      await_change(generation_, seen);
      if (!task_) return;
      run_share(id);
      pending_.fetch_sub(1, std::memory_order_acq_rel);
      pending_.notify_one();
    }
  }

  int count_;
  std::vector<std::thread> workers_;
  std::mutex busy_;
  std::size_t items_ = 0, grain_ = 1;
  Task task_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> generation_{0};
  alignas(64) std::atomic<std::uint32_t> pending_{0};
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
