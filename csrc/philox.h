#pragma once

#include <cstdint>

namespace fastbert {

// Writes a dropout mask of `heads` x `rows` x `cols` bytes: 1 where an element is kept, 0 where it is dropped.
// Element (head, row, col) is kept if byte col % 16 of
// Philox4x32-7(key = seed, counter = (col / 16, first_row + row, head, stream)) is at least `threshold`.
// Where `numbers` is given, row first_row + i is counted as row numbers[first_row + i].
// For `scores`, the columns of 64 neighbours take each other's places: fastbert.reference.score_slot.
// Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405. The specification is fastbert.reference.keep_mask.
void keep_mask(std::uint8_t* mask, std::int64_t heads, std::int64_t first_row, std::int64_t rows, std::int64_t cols,
               std::uint32_t threshold, std::uint64_t seed, std::uint32_t stream, bool scores,
               const std::int64_t* numbers = nullptr);

// The same for one row, `number`, of one head.
void keep_row(std::uint8_t* mask, std::int64_t head, std::int64_t number, std::int64_t cols, std::uint32_t threshold,
              std::uint64_t seed, std::uint32_t stream, bool scores);

}  // namespace fastbert
