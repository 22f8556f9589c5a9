#pragma once

#include <cstdint>

namespace fastbert {

// Tokens of all sequences, end to end. Throws std::invalid_argument if a length is not in [0, padded_length],
// or if there are 2^31 tokens or more: cu_seqlens are 32-bit.
std::int64_t total_tokens(const std::int64_t* lengths, std::int64_t batch, std::int64_t padded_length);

// Where each packed token lies in the (batch, padded_length) rectangle, where each sequence starts among the packed
// tokens, and each token's position in its sequence. Sequences fill their rows from the left.
// indices and position_ids hold total_tokens(...) elements, cu_seqlens batch + 1.
void pack_lengths(const std::int64_t* lengths, std::int64_t batch, std::int64_t padded_length, std::int64_t* indices,
                  std::int32_t* cu_seqlens, std::int64_t* position_ids);

}  // namespace fastbert
