// A small persistent pool: one caller and `threads() - 1` workers share a range, block by block.
//
// Workers look for the next job for 100 microseconds (a decode step is hundreds of short jobs), offering their core to others all
// the while, then sleep in the kernel: an idle pool costs nothing, and a busy neighbour is never starved. A pool that is already
// working, also one that is asked from inside a task, makes that caller do its job alone. Figures: NOTES.md.
//
// In a process with PyTorch the kernels behind its operators run on OpenMP's threads instead, as everything between them does:
// those look for the next job between two of ours, and would hold the processors that our workers want. That is so where a team
// of OpenMP has `threads()` threads, and no `OwnWorkers` is alive.
#pragma once

#include <algorithm>
#include <cstddef>

namespace anybit {

using Task = void (*)(void* context, std::size_t begin, std::size_t end) noexcept;

// Calls task(context, begin, end) over disjoint ranges that cover [0, items); cuts lie at multiples of `grain`.
// Which thread gets which range depends on the thread count, so a result must not depend on where the cuts are.
void parallel_for(std::size_t items, std::size_t grain, Task task, void* context);

// The same for a callable.
template <class F>
void parallel_for(std::size_t items, std::size_t grain, F& body) {
  parallel_for(
      items, grain,
      [](void* context, std::size_t begin, std::size_t end) noexcept { (*static_cast<F*>(context))(begin, end); }, &body);
}

// Over rows that cost `work_per_row` weight bits each: serially when there is little to do, because waking a second thread takes
// about as long as reading 32 KiB.
template <class F>
void parallel_rows(std::size_t rows, std::size_t grain, std::size_t work_per_row, F&& body) {
  constexpr std::size_t kSerialWork = std::size_t{1} << 18;
  parallel_for(rows, rows * work_per_row < kSerialWork ? std::max<std::size_t>(rows, 1) : grain, body);
}

// Default: ANYBIT_THREADS, or the processors this process may run on.
int threads();

// While one lives, jobs of this thread are for the workers: in code that runs many of them and nothing of OpenMP's between.
class OwnWorkers {
 public:
  OwnWorkers();
  ~OwnWorkers();
  OwnWorkers(const OwnWorkers&) = delete;
  OwnWorkers& operator=(const OwnWorkers&) = delete;

 private:
  bool before_;
};

// 1..256; throws std::invalid_argument otherwise. Waits for a running job.
void set_threads(int count);

}  // namespace anybit
