#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fastbert {

// Calls work(i) for each i < count on several threads; what the first failure throws is thrown here.
template <typename Work>
void parallel_for(std::int64_t count, int threads, const Work& work) {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto run = [&] {
    for (std::int64_t i = next++; i < count; i = next++) {
      try {
        work(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failure_mutex);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads && thread < count; ++thread) {
    try {
      others.emplace_back(run);
    } catch (const std::system_error&) {  // no more threads to be had: those there are do all of it
      break;
    }
  }
  run();
  for (auto& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
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

}  // namespace fastbert
