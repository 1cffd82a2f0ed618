// Keeps the threads of a pool on different processors.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstddef>
#include <vector>

namespace anybit {

// Which processor each thread of a pool was last seen on; 0 is the caller.
//
// The system may run a worker on the caller's own processor and leave it there for a whole decode: the two then take turns and
// second thread gains nothing (NOTES.md has the counts). A worker that finds itself beside a thread of lower number moves.
class Seats {
 public:
  explicit Seats(int count) : seats_(static_cast<std::size_t>(count)) {
    for (auto& seat : seats_) seat.store(-1, std::memory_order_relaxed);
  }

#if defined(__linux__)
  void sit(int id) {
    const int here = sched_getcpu();
    if (of(id) != here) seats_[static_cast<std::size_t>(id)].store(here, std::memory_order_relaxed);
  }

  void spread(int id) {
    sit(id);
    if (!taken(id, of(id))) return;
    cpu_set_t allowed, free;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    CPU_ZERO(&free);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &allowed) && !taken(id, cpu)) CPU_SET(cpu, &free);
    // Refused when nothing is free. The second call takes back the restriction, not the move.
    if (!sched_setaffinity(0, sizeof free, &free)) sched_setaffinity(0, sizeof allowed, &allowed);
    sit(id);
  }

 private:
  int of(int id) const { return seats_[static_cast<std::size_t>(id)].load(std::memory_order_relaxed); }

  bool taken(int id, int cpu) const {
    for (int other = 0; other < id; ++other)
      if (of(other) == cpu) return true;
    return false;
  }
#else
  void sit(int) {}
  void spread(int) {}

 private:
#endif
  std::vector<std::atomic<int>> seats_;
};

}  // namespace anybit
