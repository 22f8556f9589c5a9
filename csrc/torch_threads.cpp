#include "torch_threads.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <cstddef>
#include <string>
#endif

namespace fastbert {

#if defined(__linux__)
namespace {

struct OpenMp {
  // GOMP_parallel(work, data, threads, flags): what GCC makes of `#pragma omp parallel num_threads(threads)`.
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*rank)() = nullptr;
  int (*size)() = nullptr;
};

bool is_forked = false;
// From the start: PyTorch may have made its threads, and the process been forked, before anything of ours runs.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}

// PyTorch's own, which some of its builds have under a name of their own.
int of_torch(dl_phdr_info* library, std::size_t, void* path) {
  const std::string name = library->dlpi_name == nullptr ? "" : library->dlpi_name;
  if (name.find("torch") == std::string::npos || name.find("libgomp") == std::string::npos) return 0;
  *static_cast<std::string*>(path) = name;
  return 1;
}

OpenMp loaded() {
  OpenMp found;
  std::string path = "libgomp.so.1";
  dl_iterate_phdr(of_torch, &path);
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return found;
  find(library, "GOMP_parallel", found.parallel);
  find(library, "omp_get_thread_num", found.rank);
  find(library, "omp_get_num_threads", found.size);
  return found;
}

struct Call {
  const OpenMp& open_mp;
  void (*work)(void*, int, int);
  void* data;
};

}  // namespace

bool run_on_torch_threads(int threads, void (*work)(void*, int, int), void* data) {
  static const OpenMp open_mp = loaded();
  if (open_mp.parallel == nullptr || open_mp.rank == nullptr || open_mp.size == nullptr || is_forked) return false;
  Call call{open_mp, work, data};
  const auto run = [](void* from) {
    const Call& it = *static_cast<Call*>(from);
    it.work(it.data, it.open_mp.rank(), it.open_mp.size());
  };
  open_mp.parallel(run, &call, static_cast<unsigned>(threads), 0);
  return true;
}
#else
bool run_on_torch_threads(int, void (*)(void*, int, int), void*) { return false; }
#endif

}  // namespace fastbert
