#include "corpus.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "parallel.h"

namespace fastbert {
namespace {

// 0 = offsets[0] < offsets[1] < ... < offsets[count] = last.
bool rises(const std::uint32_t* offsets, std::int64_t count, std::int64_t last) {
  if (offsets[0] != 0 || offsets[count] != last) return false;
  bool rising = true;
  for (std::int64_t i = 0; i < count; ++i) rising &= offsets[i] < offsets[i + 1];
  return rising;
}

}  // namespace

Corpus::Corpus(std::vector<Part> parts, int threads) : parts_(std::move(parts)), starts_{0} {
  parallel_for(static_cast<std::int64_t>(parts_.size()), threads, [&](std::int64_t i) {
    const Part& part = parts_[static_cast<std::size_t>(i)];
    if (!rises(part.sentences, part.sentence_count, part.token_count))
      throw std::invalid_argument("part " + std::to_string(i) + ": its sentences do not add up to its tokens");
    if (!rises(part.documents, part.document_count, part.sentence_count))
      throw std::invalid_argument("part " + std::to_string(i) + ": its documents do not add up to its sentences");
  });
  for (const Part& part : parts_) {
    starts_.push_back(starts_.back() + part.document_count);
    tokens_ += part.token_count;
  }
  if (starts_.back() >= std::int64_t{1} << 32) throw std::invalid_argument("there are 2^32 documents or more");
}

Document Corpus::document(std::int64_t i) const {
  const auto behind = std::upper_bound(starts_.begin(), starts_.end(), i);
  const auto part = static_cast<std::size_t>(behind - starts_.begin()) - 1;
  const std::uint32_t* first = parts_[part].documents + (i - starts_[part]);
  return {static_cast<std::uint32_t>(part), first[0], first[1]};
}

}  // namespace fastbert
