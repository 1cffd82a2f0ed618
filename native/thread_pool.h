// A small persistent pool: one caller and `threads() - 1` workers share a range, block by block.
//
// Workers spin briefly after a job (a decode step is hundreds of short jobs), yield, then sleep in the kernel: an idle pool costs
// nothing, and a busy neighbour is never starved. A pool that is already working makes the second caller do its job alone.
#pragma once

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

// Default: ANYBIT_THREADS, or the processors this process may run on.
int threads();

// 1..256; throws std::invalid_argument otherwise. Waits for a running job.
void set_threads(int count);

}  // namespace anybit
