#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "torch_threads.h"

namespace fastbert {

// work(i) for each i < count, whoever comes first; what the first failure throws is thrown by `rethrow`.
template <typename Work>
class Tasks {
 public:
  Tasks(std::int64_t count, const Work& work) : count_(count), work_(work) {}

  void run() {
    for (std::int64_t i = next_++; i < count_; i = next_++) {
      try {
        work_(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
        next_ = count_;
      }
    }
  }
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  const std::int64_t count_;
  const Work& work_;
  std::atomic<std::int64_t> next_{0};
  std::exception_ptr failure_;
  std::mutex mutex_;
};

// Calls work(i) for each i < count on several threads of its own; what the first failure throws is thrown here.
template <typename Work>
void parallel_for(std::int64_t count, int threads, const Work& work) {
  Tasks<Work> tasks(count, work);
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads && thread < count; ++thread) {
    try {
      others.emplace_back([&tasks] { tasks.run(); });
    } catch (const std::system_error&) {  // no more threads to be had: those there are do all of it
      break;
    }
  }
  tasks.run();
  for (auto& other : others) other.join();
  tasks.rethrow();
}

// The same on threads of PyTorch's, where they can be had.
template <typename Work>
void torch_parallel_for(std::int64_t count, int threads, const Work& work) {
  if (threads < 2 || count < 2) return parallel_for(count, 1, work);
  Tasks<Work> tasks(count, work);
  const auto run = [](void* all, int, int) { static_cast<Tasks<Work>*>(all)->run(); };
  // All threads, however few tasks there are: GNU's OpenMP ends those that a smaller team leaves over, and starts them
  // again for what comes next.
  if (!run_on_torch_threads(threads, run, &tasks)) return parallel_for(count, threads, work);
  tasks.rethrow();
}

// Calls work(rank) on as many threads at the same time, which may wait for each other. Returns false, and has called
// nothing, where there are no more threads to be had. What work throws ends the program.
template <typename Work>
bool all_at_once(int threads, const Work& work) {
  enum { kWait, kGo, kGoHome };
  std::atomic<int> state{kWait};
  const auto run = [&](int rank) noexcept {
    while (state.load(std::memory_order_acquire) == kWait) std::this_thread::yield();
    if (state.load(std::memory_order_relaxed) == kGo) work(rank);
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(threads));
  try {
    for (int rank = 1; rank < threads; ++rank) others.emplace_back(run, rank);
    state.store(kGo, std::memory_order_release);
  } catch (...) {
    state.store(kGoHome, std::memory_order_release);
  }
  run(0);
  for (auto& other : others) other.join();
  return state.load(std::memory_order_relaxed) == kGo;
}

// The same on threads of PyTorch's, where as many can be had.
template <typename Work>
bool all_torch_threads_at_once(int threads, const Work& work) {
  struct All {
    const Work& work;
    int threads;
    bool came;
  } all{work, threads, false};
  const auto run = [](void* data, int rank, int size) noexcept {
    All& of = *static_cast<All*>(data);
    if (size != of.threads) return;
    if (rank == 0) of.came = true;
    of.work(rank);
  };
  if (run_on_torch_threads(threads, run, &all) && all.came) return true;
  return all_at_once(threads, work);
}

}  // namespace fastbert
