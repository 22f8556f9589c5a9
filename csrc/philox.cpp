#include "philox.h"

#include <algorithm>

// One build serves every x86-64 CPU: the loader picks the widest of these at run time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FASTBERT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTBERT_CLONES
#endif

namespace fastbert {
namespace {

constexpr int kBlocks = 64;  // counters computed side by side, so that the compiler vectorises across them

// Mask bytes 16 i ... 16 i + 15 from counter (first_block + i, row, head, stream), i < blocks; threshold < 256.
FASTBERT_CLONES
void keep_blocks(std::uint8_t (&mask)[16 * kBlocks], int blocks, std::uint32_t first_block, std::uint32_t row, std::uint32_t head,
                 std::uint32_t stream, std::uint64_t seed, std::uint8_t threshold) {
  std::uint32_t words[4][kBlocks];
  for (int i = 0; i < blocks; ++i) {
    std::uint32_t c0 = first_block + static_cast<std::uint32_t>(i), c1 = row, c2 = head, c3 = stream;
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 7; ++round) {
      const std::uint64_t product0 = static_cast<std::uint64_t>(c0) * 0xD2511F53u;
      const std::uint64_t product1 = static_cast<std::uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<std::uint32_t>(product1);
      c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<std::uint32_t>(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0][i] = c0;
    words[1][i] = c1;
    words[2][i] = c2;
    words[3][i] = c3;
  }
  std::uint32_t random[4 * kBlocks];
  for (int i = 0; i < blocks; ++i) {
    for (int word = 0; word < 4; ++word) random[4 * i + word] = words[word][i];
  }
  // Byte b of a word is bits 8 b ... 8 b + 7: memory order on every little-endian machine.
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(random);
  for (int i = 0; i < 16 * blocks; ++i) mask[i] = bytes[i] >= threshold;
}

// Column 8 j + 2 t + i of 64 takes element 2 j + i of their block t.
void order_scores(const std::uint8_t* kept, std::uint8_t* ordered, int groups) {
  for (; groups > 0; --groups, kept += 64, ordered += 64) {
    for (int j = 0; j < 8; ++j) {
      for (int t = 0; t < 4; ++t) std::copy_n(kept + 16 * t + 2 * j, 2, ordered + 8 * j + 2 * t);
    }
  }
}

}  // namespace

void keep_row(std::uint8_t* mask, std::int64_t head, std::int64_t number, std::int64_t cols, std::uint32_t threshold,
              std::uint64_t seed, std::uint32_t stream, bool scores) {
  if (threshold > 255) {
    std::fill_n(mask, cols, std::uint8_t{0});
    return;
  }
  static_assert(kBlocks % 4 == 0);  // 64 columns never lie in two batches
  std::uint8_t kept[16 * kBlocks], ordered[16 * kBlocks];
  for (std::int64_t start = 0; start < cols; start += 16 * kBlocks) {
    const std::int64_t count = std::min<std::int64_t>(cols - start, 16 * kBlocks);
    const int blocks = scores ? static_cast<int>((count + 63) / 64 * 4) : static_cast<int>((count + 15) / 16);
    keep_blocks(kept, blocks, static_cast<std::uint32_t>(start / 16), static_cast<std::uint32_t>(number),
                static_cast<std::uint32_t>(head), stream, seed, static_cast<std::uint8_t>(threshold));
    if (scores) order_scores(kept, ordered, blocks / 4);
    std::copy_n(scores ? ordered : kept, count, mask + start);
  }
}

void keep_mask(std::uint8_t* mask, std::int64_t heads, std::int64_t first_row, std::int64_t rows, std::int64_t cols,
               std::uint32_t threshold, std::uint64_t seed, std::uint32_t stream, bool scores,
               const std::int64_t* numbers) {
  for (std::int64_t head = 0; head < heads; ++head) {
    for (std::int64_t row = first_row; row < first_row + rows; ++row, mask += cols)
      keep_row(mask, head, numbers == nullptr ? row : numbers[row], cols, threshold, seed, stream, scores);
  }
}

}  // namespace fastbert
