#include "sampling.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "parallel.h"

namespace fastbert {
namespace {

constexpr std::int64_t kGroup = 64;  // documents that one thread plans; full sentences do not run across groups

struct Planned {
  std::vector<Sequence> sequences;
  std::vector<Piece> pieces;
};

// A run of tokens that is cut at both ends.
struct Segment {
  std::uint32_t part;
  std::int64_t start, length;

  void cut(Random& random, std::int64_t tokens) {
    start += random.heads(tokens);  // each token goes from the front or from the back
    length -= tokens;
  }
};

std::int64_t draw_target(Random& random, std::int64_t room, double short_probability) {
  if (random.uniform() >= short_probability || room <= 2) return room;
  return 2 + random.below(static_cast<std::uint32_t>(room - 1));
}

// Takes tokens from the longer of the two, one at a time, until both fit.
void truncate(Random& random, Segment& a, Segment& b, std::int64_t room) {
  const std::int64_t excess = a.length + b.length - room;
  if (excess <= 0) return;
  const std::int64_t level = std::min(excess, std::abs(a.length - b.length));
  std::int64_t from_a = a.length > b.length ? level : 0, from_b = a.length > b.length ? 0 : level;
  from_b += (excess - level + 1) / 2;
  from_a += (excess - level) / 2;
  a.cut(random, from_a);
  b.cut(random, from_b);
}

void plan_pairs(const Corpus& corpus, const Sampling& sampling, std::int64_t epoch, std::int64_t number, Planned& out) {
  const Document document = corpus.document(number);
  const std::int64_t room = sampling.max_length - 3;
  Random random(Random::Use::sequences, sampling.seed, sampling.draws_of(epoch), static_cast<std::uint64_t>(number));
  std::uint32_t count = 0;
  for (std::uint32_t first = document.first; first < document.end;) {
    const std::int64_t target = draw_target(random, room, sampling.short_probability);
    std::uint32_t end = first + 1;
    while (end < document.end && corpus.length(document.part, first, end) < target) ++end;
    bool random_next = (random.next() & 1) != 0;
    if (!random_next && end == first + 1) {  // what follows a single sentence is the next one
      if (end < document.end) {
        ++end;
      } else {
        random_next = true;
      }
    }
    std::uint32_t a_end = first + 1;
    if (end - first > 2) a_end += random.below(end - first - 1);
    Segment a{document.part, corpus.part(document.part).sentences[first], corpus.length(document.part, first, a_end)};
    Segment b{document.part, corpus.part(document.part).sentences[a_end], corpus.length(document.part, a_end, end)};
    if (random_next) {
      std::int64_t other = random.below(static_cast<std::uint32_t>(corpus.documents() - 1));
      if (other >= number) ++other;
      const Document partner = corpus.document(other);
      const std::uint32_t b_first = partner.first + random.below(partner.end - partner.first);
      std::uint32_t b_end = b_first + 1;
      while (b_end < partner.end && corpus.length(partner.part, b_first, b_end) < target - a.length) ++b_end;
      b = {partner.part, corpus.part(partner.part).sentences[b_first], corpus.length(partner.part, b_first, b_end)};
      end = a_end;  // the sentences that B was to have had are put back
    }
    truncate(random, a, b, room);
    out.sequences.push_back({static_cast<std::uint32_t>(number), count++, static_cast<std::uint32_t>(out.pieces.size()), 2,
                             static_cast<std::int8_t>(random_next), static_cast<std::uint32_t>(a.length + b.length + 3)});
    for (const Segment& segment : {a, b}) {
      out.pieces.push_back({static_cast<std::uint64_t>(segment.start), segment.part, static_cast<std::uint32_t>(segment.length)});
    }
    first = end;
  }
}

// Fills sequences with the documents of a group, one after the other.
class FullSentences {
 public:
  FullSentences(const Corpus& corpus, const Sampling& sampling, std::int64_t epoch, std::int64_t group, Planned& out)
      : corpus_(corpus),
        sampling_(sampling),
        group_(static_cast<std::uint32_t>(group)),
        random_(Random::Use::sequences, sampling.seed, sampling.draws_of(epoch), static_cast<std::uint64_t>(group)),
        out_(out) {
    begin();
  }

  void add(std::int64_t number) {
    const Document document = corpus_.document(number);
    open_ = false;
    for (std::uint32_t sentence = document.first; sentence < document.end; ++sentence) {
      std::int64_t start = corpus_.part(document.part).sentences[sentence];
      std::int64_t length = corpus_.length(document.part, sentence, sentence + 1);
      if (length > room()) finish();
      while (length > room()) {  // longer than a sequence: it is cut
        const std::int64_t head = room();
        extend(document.part, start, head);
        finish();
        start += head;
        length -= head;
      }
      extend(document.part, start, length);
    }
  }

  void finish() {
    if (pieces_ == 0) return;
    const auto first = static_cast<std::uint32_t>(out_.pieces.size()) - pieces_;
    out_.sequences.push_back({group_, count_++, first, static_cast<std::uint16_t>(pieces_), 0, static_cast<std::uint32_t>(length_)});
    begin();
  }

 private:
  // Tokens that can be added: a new piece costs a [SEP].
  std::int64_t room() const { return target_ - length_ - (open_ ? 0 : 1); }

  void begin() {
    const std::int64_t room = sampling_.max_length - 2;
    target_ = 2 + draw_target(random_, room, sampling_.short_probability);
    length_ = 1;
    pieces_ = 0;
    open_ = false;
  }

  void extend(std::uint32_t part, std::int64_t start, std::int64_t length) {
    if (open_) {
      out_.pieces.back().length += static_cast<std::uint32_t>(length);
    } else {
      out_.pieces.push_back({static_cast<std::uint64_t>(start), part, static_cast<std::uint32_t>(length)});
      ++pieces_;
      ++length_;
      open_ = true;
    }
    length_ += length;
  }

  const Corpus& corpus_;
  const Sampling& sampling_;
  std::uint32_t group_, count_ = 0, pieces_ = 0;
  Random random_;
  Planned& out_;
  std::int64_t target_ = 0, length_ = 0;
  bool open_ = false;  // the last piece is this document's
};

}  // namespace

void Sampling::check() const {
  if (max_length < 5 || max_length > 65535) throw std::invalid_argument("max_length must be in [5, 65535]");
  if (!(short_probability >= 0.0 && short_probability <= 1.0))
    throw std::invalid_argument("short_probability must be in [0, 1]");
  if (window_tokens < 1) throw std::invalid_argument("window_tokens must be at least 1");
  if (static_copies < 0) throw std::invalid_argument("static_copies must not be negative");
}

Plan plan(const Corpus& corpus, const Sampling& sampling, std::int64_t epoch, std::int64_t first_document, int threads) {
  const std::int64_t documents = corpus.documents();
  const bool pairs = sampling.form == Sampling::Form::pairs;
  if (epoch < 0) throw std::invalid_argument("epoch must not be negative");
  if (first_document < 0 || first_document >= documents || first_document % kGroup != 0)
    throw std::invalid_argument("no window starts with this document");
  if (pairs && documents < 2) throw std::invalid_argument("sentence pairs need at least two documents");

  const Permutation order(static_cast<std::uint64_t>(documents), sampling.seed, sampling.draws_of(epoch));
  std::vector<std::int64_t> numbers;
  std::int64_t tokens = 0, next = first_document;
  while (next < documents && (tokens < sampling.window_tokens || next % kGroup != 0)) {
    numbers.push_back(static_cast<std::int64_t>(order(static_cast<std::uint64_t>(next++))));
    tokens += corpus.length(corpus.document(numbers.back()));
  }

  const auto count = static_cast<std::int64_t>(numbers.size());
  std::vector<Planned> groups(static_cast<std::size_t>((count + kGroup - 1) / kGroup));
  parallel_for(static_cast<std::int64_t>(groups.size()), threads, [&](std::int64_t group) {
    Planned& out = groups[static_cast<std::size_t>(group)];
    const std::int64_t end = std::min(count, (group + 1) * kGroup);
    if (pairs) {
      for (std::int64_t i = group * kGroup; i < end; ++i) {
        plan_pairs(corpus, sampling, epoch, numbers[static_cast<std::size_t>(i)], out);
      }
    } else {
      FullSentences sentences(corpus, sampling, epoch, first_document / kGroup + group, out);
      for (std::int64_t i = group * kGroup; i < end; ++i) sentences.add(numbers[static_cast<std::size_t>(i)]);
      sentences.finish();
    }
  });

  Plan plan{epoch, first_document, next, {}, {}};
  for (Planned& group : groups) {
    const auto pieces_before = static_cast<std::uint32_t>(plan.pieces.size());
    for (Sequence& sequence : group.sequences) sequence.first_piece += pieces_before;
    plan.sequences.insert(plan.sequences.end(), group.sequences.begin(), group.sequences.end());
    plan.pieces.insert(plan.pieces.end(), group.pieces.begin(), group.pieces.end());
    group = {};
  }
  Random random(Random::Use::order, sampling.seed, static_cast<std::uint64_t>(epoch), static_cast<std::uint64_t>(first_document));
  for (std::size_t i = plan.sequences.size(); i > 1; --i) {
    std::swap(plan.sequences[i - 1], plan.sequences[random.below(static_cast<std::uint32_t>(i))]);
  }
  return plan;
}

}  // namespace fastbert
