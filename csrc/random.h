#pragma once

#include <cstdint>

namespace fastbert {

// A stream of random numbers that depends on its key alone, so that it is the same in any thread or process.
// SplitMix64, Steele et al. 2014, https://doi.org/10.1145/2660193.2660195.
class Random {
 public:
  // What a stream is for: two uses of one key never share their numbers.
  enum class Use : std::uint64_t { documents, sequences, order, batches, masking };

  Random(Use use, std::uint64_t seed, std::uint64_t epoch, std::uint64_t index, std::uint64_t number = 0) {
    for (const std::uint64_t word : {seed, epoch, index, number, static_cast<std::uint64_t>(use)}) {
      state_ = mix(state_ ^ mix(word + kGamma));
    }
  }

  std::uint64_t next() { return mix(state_ += kGamma); }

  // Uniform in [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  // Uniform in {0, ..., n - 1}, n > 0, without bias: Lemire 2019, https://doi.org/10.1145/3230636.
  std::uint32_t below(std::uint32_t n) {
    std::uint64_t product = (next() >> 32) * n;
    if (static_cast<std::uint32_t>(product) < n) {
      const std::uint32_t floor = (0u - n) % n;
      while (static_cast<std::uint32_t>(product) < floor) product = (next() >> 32) * n;
    }
    return static_cast<std::uint32_t>(product >> 32);
  }

  // How many of n fair coins show heads.
  std::int64_t heads(std::int64_t n) {
    std::int64_t sum = 0;
    for (; n >= 64; n -= 64) sum += popcount(next());
    return n > 0 ? sum + popcount(next() >> (64 - n)) : sum;
  }

  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

 private:
  static constexpr std::uint64_t kGamma = 0x9E3779B97F4A7C15u;

  static int popcount(std::uint64_t word) {
    int count = 0;
    for (; word != 0; word &= word - 1) ++count;
    return count;
  }

  std::uint64_t state_ = 0;
};

// A random order of {0, ..., size - 1} that is computed, not stored: a Feistel network on the next power of four, walked
// until it lands inside (Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9).
class Permutation {
 public:
  Permutation(std::uint64_t size, std::uint64_t seed, std::uint64_t epoch) : size_(size) {
    Random random(Random::Use::documents, seed, epoch, size);
    for (auto& key : keys_) key = random.next();
    while ((std::uint64_t{1} << (2 * half_)) < size) ++half_;
  }

  std::uint64_t operator()(std::uint64_t i) const {
    do {
      i = encrypt(i);
    } while (i >= size_);
    return i;
  }

 private:
  std::uint64_t encrypt(std::uint64_t i) const {
    const std::uint64_t mask = (std::uint64_t{1} << half_) - 1;
    std::uint64_t left = i >> half_, right = i & mask;
    for (const std::uint64_t key : keys_) {
      const std::uint64_t mixed = left ^ (Random::mix(right ^ key) & mask);
      left = right;
      right = mixed;
    }
    return left << half_ | right;
  }

  std::uint64_t size_;
  std::uint64_t keys_[8];
  int half_ = 1;
};

}  // namespace fastbert
