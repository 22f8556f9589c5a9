#pragma once

#include <cstdint>
#include <vector>

#include "corpus.h"
#include "random.h"

namespace fastbert {

// How sequences are cut from documents.
struct Sampling {
  enum class Form {
    pairs,           // [CLS] A [SEP] B [SEP] for next-sentence prediction, https://arxiv.org/abs/1810.04805
    full_sentences,  // [CLS] sentences [SEP], into the next document behind another [SEP], https://arxiv.org/abs/1907.11692
  };
  Form form = Form::pairs;
  std::int64_t max_length = 128;          // tokens, special ones included
  double short_probability = 0.1;         // of a sequence that is cut to a random length
  std::int64_t window_tokens = 1 << 24;   // about as many are planned and shuffled at a time
  std::uint64_t seed = 0;
  std::int64_t static_copies = 0;         // same sequences and masks in epochs e and e + this; 0: every epoch anew

  // Throws std::invalid_argument naming what is out of range.
  void check() const;
  std::uint64_t draws_of(std::int64_t epoch) const {
    return static_cast<std::uint64_t>(static_copies > 0 ? epoch % static_copies : epoch);
  }
};

// Consecutive tokens of one part. Each is followed by a [SEP].
struct Piece {
  std::uint64_t start;
  std::uint32_t part, length;
};

struct Sequence {
  std::uint32_t source, number;  // with seed and epoch, what its draws depend on: a document, or a group of them, and
                                 // how many sequences that gave before
  std::uint32_t first_piece;
  std::uint16_t pieces;
  std::int8_t random_next;  // pairs: 1 where B is another document's, 0 where it follows A
  std::uint32_t length;     // tokens, special ones included
};

// The sequences of some consecutive documents of an epoch, shuffled.
struct Plan {
  std::int64_t epoch = 0;
  std::int64_t first_document = 0, next_document = 0;  // in the epoch's order
  std::vector<Sequence> sequences;
  std::vector<Piece> pieces;
};

// Plans the documents of an epoch from the first_document-th on, as many as make a window; they end with the epoch.
// All of it depends on (seed, epoch, first_document) alone, not on the number of threads.
// Throws std::invalid_argument where pairs are asked of fewer than two documents.
Plan plan(const Corpus& corpus, const Sampling& sampling, std::int64_t epoch, std::int64_t first_document, int threads);

}  // namespace fastbert
