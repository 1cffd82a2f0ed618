#include <atomic>
#include <chrono>

#include "cpu.h"
#include "thread_pool.h"

namespace anybit {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

// Cut finely: a thread whose core a neighbour takes for a while then does less, instead of making the others wait.
double seconds_to_read(const std::uint8_t* data, size_t bytes) {
  constexpr size_t kBlock = size_t{1} << 20;
  const MachineTable& k = ANYBIT_ACTIVE(machine_table);
  std::atomic<std::uint64_t> sink{0};
  const auto start = std::chrono::steady_clock::now();
  auto body = [&](size_t begin, size_t end) noexcept { sink ^= k.read(data + begin, end - begin); };
  parallel_for(bytes, kBlock, body);
  return seconds_since(start);
}

double multiply_adds_per_second(Peak peak, size_t steps) {
  const MachineTable& k = ANYBIT_ACTIVE(machine_table);
  const auto loop = peak == Peak::dot_int8 ? k.dot_int8 : peak == Peak::tiles_int8 ? k.tiles_int8 : k.tiles_bf16;
  if (!loop) return 0;
  const size_t pieces = static_cast<size_t>(threads()) * 4;
  std::atomic<double> done{0};
  std::atomic<std::int32_t> sink{0};
  const auto start = std::chrono::steady_clock::now();
  auto body = [&](size_t begin, size_t end) noexcept {
    for (size_t i = begin; i < end; ++i) {
      std::int32_t value = 0;
      done += loop(steps, &value);
      sink ^= value;
    }
  };
  parallel_for(pieces, 1, body);
  return done / seconds_since(start);
}

}  // namespace anybit
