// The OpenMP library of the process, if it has loaded one: PyTorch's operators run on its threads.
#pragma once

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

namespace anybit {

// Found by name, because nothing of ours is linked with it: GNU's functions, which LLVM's library has as well.
class OpenMp {
 public:
  // Null while there is none (it is looked for each time), and in a forked child, which has none of its threads but would wait for
  // them.
  static const OpenMp* loaded() {
    static std::atomic<const OpenMp*> found{nullptr};
    static std::atomic<bool> forked{false};
    [[maybe_unused]] static const int once = pthread_atfork(nullptr, nullptr, [] { forked = true; });
    if (forked) return nullptr;
    if (!found) found = look();
    return found;
  }

  // Of a parallel region that the calling thread would open.
  int threads() const { return threads_(); }

  // member(context) on so many threads or fewer, the caller among them; returns when all are done.
  void run(void (*member)(void*), void* context, int threads) const {
    parallel_(member, context, static_cast<unsigned>(threads), 0);
  }

 private:
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Threads = int (*)();

  OpenMp(Parallel parallel, Threads threads) : parallel_(parallel), threads_(threads) {}

  static const OpenMp* look() {
    for (const char* name : {static_cast<const char*>(nullptr), "libgomp.so.1", "libiomp5.so", "libomp.so.5"})
      if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
        const auto parallel = reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
        const auto threads = reinterpret_cast<Threads>(dlsym(library, "omp_get_max_threads"));
        if (parallel && threads) return new OpenMp(parallel, threads);  // for the life of the process
      }
    return nullptr;
  }

  Parallel parallel_;
  Threads threads_;
};

}  // namespace anybit
