#pragma once

#include <cstdint>
#include <vector>

namespace fastbert {

// Neighbouring sequences that go through all layers together.
struct Share {
  std::int64_t first, last;
};

// The first `alone` shares are of one thread each, whoever comes first; all threads are at each of the others.
struct Shares {
  std::vector<Share> all;
  std::int64_t alone = 0;
};

// Sequences in shares with about as many tokens as each other: not so few that reading the weights counts, nor so many
// that they leave the cache; several a thread, for a thread that has to wait for a core not to hold up the others.
// cu_seqlens has sequences + 1 elements.
Shares shares_of(const std::int32_t* cu_seqlens, std::int64_t sequences, int threads);

}  // namespace fastbert
