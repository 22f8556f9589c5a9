#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace fastbert {

// Threads that work on one thing together, each with a rank. A team of one waits for nobody.
class Team {
 public:
  explicit Team(int size) : size_(size) {}
  int size() const { return size_; }

  // Returns once all have called it. Whoever waits spins for a while, for the others are about to come.
  void wait() {
    if (size_ == 1) return;
    const unsigned turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpins = 4096;
  const int size_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> turn_{0};
};

// A member's place in its team, and its share of `count` things.
struct Member {
  Team& team;
  int rank;

  std::int64_t begin(std::int64_t count) const { return count * rank / team.size(); }
  std::int64_t end(std::int64_t count) const { return count * (rank + 1) / team.size(); }
  void wait() const { team.wait(); }
};

}  // namespace fastbert
