#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "corpus.h"
#include "masking.h"
#include "sampling.h"

namespace fastbert {

// The arrays of a packed batch of B sequences and T tokens, (T,) each unless said.
struct Batch {
  std::int64_t* input_ids;
  std::int64_t* token_type_ids;  // pairs: 0 up to the first [SEP], 1 behind it
  std::int64_t* position_ids;    // from 0 in each sequence
  std::int64_t* labels;          // -100 where there is none
  std::int32_t* cu_seqlens;      // (B + 1,)
  std::int64_t* next_sentence_label;  // (B,): 1 where B is another document's; unused for full sentences
};

struct Tokens {
  std::int32_t cls, sep;
};

enum class Objective { masked, left_to_right };

// Writes sequences picks[0 ... count) of a plan. Returns which tokens have a label, rising: masked, those that were
// chosen; left to right, all but the last of each sequence, whose labels are their successors.
// Draws depend on (seed, epoch, sequence) alone. Throws std::invalid_argument at an id that is not in the vocabulary.
std::vector<std::int64_t> write_batch(const Corpus& corpus, const Sampling& sampling, const Vocabulary& vocabulary,
                                      const Tokens& tokens, const Masking& masking, Objective objective, const Plan& plan,
                                      const std::int64_t* picks, std::int64_t count, int threads, const Batch& batch);

// Sequences that share a batch: those of batch i are order[offsets[i] ... offsets[i + 1]).
struct Batches {
  std::vector<std::int64_t> order, offsets;
};

// Batches of at most `budget` tokens, in a random order from (seed, epoch, index).
// Packed, they are as full as they get: from the longest sequence to the shortest, each goes into the fullest batch that
// has room for it (longest-pack-first histogram packing, Krell et al. 2021, https://arxiv.org/abs/2107.02027).
// By length, they hold neighbours in length.
// Throws std::invalid_argument if a length is not in [1, budget].
enum class Grouping { packed, by_length };
Batches group_into_batches(const std::int64_t* lengths, std::int64_t count, std::int64_t budget, Grouping grouping,
                           std::uint64_t seed, std::uint64_t epoch, std::uint64_t index);

}  // namespace fastbert
