#include "packing.h"

#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fastbert {

std::int64_t total_tokens(const std::int64_t* lengths, std::int64_t batch, std::int64_t padded_length) {
  std::int64_t tokens = 0;
  for (std::int64_t row = 0; row < batch; ++row) {
    if (lengths[row] < 0 || lengths[row] > padded_length) {
      throw std::invalid_argument("lengths[" + std::to_string(row) + "] is " + std::to_string(lengths[row]) +
                                  ", not in [0, " + std::to_string(padded_length) + "]");
    }
    tokens += lengths[row];
    if (tokens > std::numeric_limits<std::int32_t>::max()) {
      throw std::invalid_argument("lengths add up to more than 2^31 - 1 tokens");
    }
  }
  return tokens;
}

void pack_lengths(const std::int64_t* lengths, std::int64_t batch, std::int64_t padded_length, std::int64_t* indices,
                  std::int32_t* cu_seqlens, std::int64_t* position_ids) {
  std::int64_t token = 0;
  cu_seqlens[0] = 0;
  for (std::int64_t row = 0; row < batch; ++row) {
    std::iota(indices + token, indices + token + lengths[row], row * padded_length);
    std::iota(position_ids + token, position_ids + token + lengths[row], std::int64_t{0});
    token += lengths[row];
    cu_seqlens[row + 1] = static_cast<std::int32_t>(token);
  }
}

}  // namespace fastbert
