#include "batches.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <stdexcept>
#include <utility>

#include "parallel.h"

namespace fastbert {
namespace {

constexpr std::int64_t kChunk = 64;  // sequences that one thread writes

// False at an id that is not in the vocabulary.
template <typename Id>
bool copy_ids(const Id* from, std::int64_t count, std::int64_t bound, std::int64_t* to) {
  Id largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = from[i];
    largest = std::max(largest, from[i]);
  }
  return static_cast<std::int64_t>(largest) < bound;
}

using Groups = std::vector<std::vector<std::int64_t>>;

Groups pack(const std::int64_t* lengths, const std::vector<std::int64_t>& longest_first, std::int64_t budget) {
  Groups packs;
  std::vector<std::vector<std::size_t>> with_room(static_cast<std::size_t>(budget) + 1);  // packs, by tokens left
  std::set<std::int64_t> rooms;                                                           // that some pack has
  for (const std::int64_t sequence : longest_first) {
    const auto fullest = rooms.lower_bound(lengths[sequence]);
    std::size_t pack = packs.size();
    std::int64_t room = budget;
    if (fullest == rooms.end()) {
      packs.emplace_back();
    } else {
      room = *fullest;
      auto& candidates = with_room[static_cast<std::size_t>(room)];
      pack = candidates.back();
      candidates.pop_back();
      if (candidates.empty()) rooms.erase(fullest);
    }
    packs[pack].push_back(sequence);
    room -= lengths[sequence];
    if (room > 0) {
      with_room[static_cast<std::size_t>(room)].push_back(pack);
      rooms.insert(room);
    }
  }
  return packs;
}

Groups cut(const std::int64_t* lengths, const std::vector<std::int64_t>& longest_first, std::int64_t budget) {
  Groups runs;
  std::int64_t tokens = budget;
  for (const std::int64_t sequence : longest_first) {
    if (tokens + lengths[sequence] > budget) {
      runs.emplace_back();
      tokens = 0;
    }
    runs.back().push_back(sequence);
    tokens += lengths[sequence];
  }
  return runs;
}

}  // namespace

std::vector<std::int64_t> write_batch(const Corpus& corpus, const Sampling& sampling, const Vocabulary& vocabulary,
                                      const Tokens& tokens, const Masking& masking, Objective objective, const Plan& plan,
                                      const std::int64_t* picks, std::int64_t count, int threads, const Batch& batch) {
  const auto bound = static_cast<std::int64_t>(vocabulary.kinds.size());
  const bool pairs = sampling.form == Sampling::Form::pairs;
  batch.cu_seqlens[0] = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Sequence& sequence = plan.sequences[static_cast<std::size_t>(picks[i])];
    batch.cu_seqlens[i + 1] = batch.cu_seqlens[i] + static_cast<std::int32_t>(sequence.length);
    if (pairs) batch.next_sentence_label[i] = sequence.random_next;
  }
  const std::int64_t chunks = (count + kChunk - 1) / kChunk;
  std::vector<std::vector<std::int64_t>> rows(static_cast<std::size_t>(chunks));
  parallel_for(chunks, threads, [&](std::int64_t chunk) {
    Masker masker(masking, vocabulary);
    std::vector<std::int64_t>& labelled = rows[static_cast<std::size_t>(chunk)];
    for (std::int64_t i = chunk * kChunk; i < std::min(count, (chunk + 1) * kChunk); ++i) {
      const Sequence& sequence = plan.sequences[static_cast<std::size_t>(picks[i])];
      const std::int64_t first = batch.cu_seqlens[i], length = sequence.length;
      std::int64_t *ids = batch.input_ids + first, *types = batch.token_type_ids + first;
      std::int64_t at = 0;
      ids[at++] = tokens.cls;
      types[0] = 0;
      for (std::int64_t piece = 0; piece < sequence.pieces; ++piece) {
        const Piece& from = plan.pieces[static_cast<std::size_t>(sequence.first_piece + piece)];
        const Part& part = corpus.part(from.part);
        const std::int64_t n = from.length;
        const bool known =
            part.wide ? copy_ids(static_cast<const std::uint32_t*>(part.tokens) + from.start, n, bound, ids + at)
                      : copy_ids(static_cast<const std::uint16_t*>(part.tokens) + from.start, n, bound, ids + at);
        if (!known)
          throw std::invalid_argument("part " + std::to_string(from.part) + " holds a token that is not in the vocabulary");
        ids[at + n] = tokens.sep;
        std::fill_n(types + at, n + 1, std::int64_t{pairs ? piece : 0});
        at += n + 1;
      }
      std::iota(batch.position_ids + first, batch.position_ids + first + length, std::int64_t{0});
      std::int64_t* labels = batch.labels + first;
      if (objective == Objective::masked) {
        Random random(Random::Use::masking, sampling.seed, sampling.draws_of(plan.epoch), sequence.source, sequence.number);
        masker.corrupt(random, ids, labels, length, nullptr, first, labelled);
      } else {
        std::copy_n(ids + 1, length - 1, labels);
        labels[length - 1] = -100;
        for (std::int64_t row = first; row < first + length - 1; ++row) labelled.push_back(row);
      }
    }
  });
  std::vector<std::int64_t> all;
  for (const auto& labelled : rows) all.insert(all.end(), labelled.begin(), labelled.end());
  return all;
}

Batches group_into_batches(const std::int64_t* lengths, std::int64_t count, std::int64_t budget, Grouping grouping,
                           std::uint64_t seed, std::uint64_t epoch, std::uint64_t index) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (lengths[i] < 1 || lengths[i] > budget)
      throw std::invalid_argument("a sequence of " + std::to_string(lengths[i]) + " tokens does not fit into a batch of " +
                                  std::to_string(budget));
  }
  std::vector<std::int64_t> longest_first(static_cast<std::size_t>(count));
  std::iota(longest_first.begin(), longest_first.end(), std::int64_t{0});
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [&](std::int64_t a, std::int64_t b) { return lengths[a] > lengths[b]; });
  auto groups = grouping == Grouping::packed ? pack(lengths, longest_first, budget) : cut(lengths, longest_first, budget);
  Random random(Random::Use::batches, seed, epoch, index);
  for (std::size_t i = groups.size(); i > 1; --i) {
    std::swap(groups[i - 1], groups[random.below(static_cast<std::uint32_t>(i))]);
  }
  Batches batches{{}, {0}};
  for (const auto& group : groups) {
    batches.order.insert(batches.order.end(), group.begin(), group.end());
    batches.offsets.push_back(static_cast<std::int64_t>(batches.order.size()));
  }
  return batches;
}

}  // namespace fastbert
