#include "torch_threads.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fastbert {

#if defined(__linux__)
namespace {

// GOMP_parallel(work, data, threads, flags): what GCC makes of `#pragma omp parallel num_threads(threads)`.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

bool is_forked = false;

Parallel find() {
  pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
  void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
}

}  // namespace

bool run_on_torch_threads(int threads, void (*work)(void*), void* data) {
  static const Parallel parallel = find();
  if (parallel == nullptr || is_forked) return false;
  parallel(work, data, static_cast<unsigned>(threads), 0);
  return true;
}
#else
bool run_on_torch_threads(int, void (*)(void*), void*) { return false; }
#endif

}  // namespace fastbert
