#pragma once

#include <cstdint>
#include <vector>

#include "random.h"

namespace fastbert {

// What masking has to know of a vocabulary.
struct Vocabulary {
  static constexpr std::uint8_t kSpecial = 1;       // never chosen, never drawn
  static constexpr std::uint8_t kContinuation = 2;  // belongs to the word before it

  std::vector<std::uint8_t> kinds;     // for each id
  std::vector<std::int32_t> ordinary;  // the ids that are not special
  std::int32_t mask = 0;

  // Throws std::invalid_argument if mask is out of range, or there are only special tokens.
  Vocabulary(const std::uint8_t* kinds, std::int64_t size, std::int32_t mask);
};

// How tokens are chosen and what becomes of them. The defaults are those of BERT, https://arxiv.org/abs/1810.04805.
struct Masking {
  enum class Unit {
    token,  // BERT
    word,   // all pieces of a word, or given units (ERNIE, https://arxiv.org/abs/1904.09223)
    span,   // runs of whole words (SpanBERT, https://arxiv.org/abs/1907.10529)
  };
  Unit unit = Unit::token;
  double rate = 0.15;               // of the tokens that are not special
  double replace_by_mask = 0.8;     // of the chosen ones
  double replace_by_random = 0.1;   // of the chosen ones; the others stay as they are
  std::int64_t max_predictions = 0; // in a sequence; 0 for any number
  double span_p = 0.2;              // of the geometric distribution of a span's words
  int max_span = 10;                // words

  // Throws std::invalid_argument naming what is out of range.
  void check() const;
};

// Corrupts sequences, one at a time; keeps its scratch memory between them.
class Masker {
 public:
  Masker(const Masking& masking, const Vocabulary& vocabulary);

  // Corrupts the `length` tokens of one sequence in place. labels: the token that was there where one was chosen, -100
  // elsewhere. unit_starts: for Unit::word and span, 1 where a unit begins; nullptr for words as the vocabulary has them.
  // Appends to rows first_row + i of each chosen token i, rising. Ids must be in the vocabulary.
  //
  // As many are chosen as the rate says on average, and at least one.
  void corrupt(Random& random, std::int64_t* ids, std::int64_t* labels, std::int64_t length,
               const std::uint8_t* unit_starts, std::int64_t first_row, std::vector<std::int64_t>& rows);

 private:
  struct Range {
    std::int32_t start, end;
  };

  void choose_tokens(Random& random, const std::int64_t* ids, std::int64_t length);
  void choose_units(Random& random, std::int64_t target);
  void choose_spans(Random& random, std::int64_t target);
  void find_units(const std::int64_t* ids, std::int64_t length, const std::uint8_t* unit_starts);
  std::int64_t target(Random& random, std::int64_t candidates) const;
  bool fits(std::int64_t tokens) const { return masking_.max_predictions == 0 || tokens <= masking_.max_predictions; }

  Masking masking_;
  const Vocabulary& vocabulary_;
  std::vector<std::int32_t> places_;     // candidates, when tokens are chosen
  std::vector<Range> units_;             // words, in order
  std::vector<Range> runs_;              // of units with nothing special between them
  std::vector<std::int32_t> unit_of_;    // for each candidate
  std::vector<std::uint8_t> taken_;      // units that a span has
  std::vector<Range> chosen_;            // ranges of tokens that are replaced in the same way
  std::vector<double> span_cdf_;
};

// Corrupts `count` packed sequences; sequence i draws from (seed, epoch, first_index + i). Returns which tokens were chosen.
// Throws std::invalid_argument if an id is not in the vocabulary, or cu_seqlens does not rise from 0 to `tokens`.
std::vector<std::int64_t> corrupt(const Vocabulary& vocabulary, const Masking& masking, const std::int64_t* ids,
                                  std::int64_t tokens, const std::int64_t* cu_seqlens, std::int64_t count, std::uint64_t seed,
                                  std::uint64_t epoch, std::uint64_t first_index, const std::uint8_t* unit_starts, int threads,
                                  std::int64_t* corrupted, std::int64_t* labels);

}  // namespace fastbert
