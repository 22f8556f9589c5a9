#pragma once

#include <cstdint>
#include <vector>

namespace fastbert {

// A part of a token store, borrowed: the arrays belong to whoever maps the files.
struct Part {
  const void* tokens = nullptr;  // uint16 or uint32
  bool wide = false;
  const std::uint32_t* sentences = nullptr;  // where each starts among the tokens; then the number of tokens
  const std::uint32_t* documents = nullptr;  // which sentence each starts with; then the number of sentences
  std::int64_t token_count = 0, sentence_count = 0, document_count = 0;
};

// Sentences [first, end) of a part.
struct Document {
  std::uint32_t part, first, end;
};

class Corpus {
 public:
  // Throws std::invalid_argument naming the part whose offsets do not rise to the end of what they point into.
  Corpus(std::vector<Part> parts, int threads);

  std::int64_t documents() const { return starts_.back(); }
  std::int64_t tokens() const { return tokens_; }
  const Part& part(std::uint32_t i) const { return parts_[i]; }
  Document document(std::int64_t i) const;
  // Tokens of sentences [first, end).
  std::int64_t length(std::uint32_t part, std::uint32_t first, std::uint32_t end) const {
    return std::int64_t{parts_[part].sentences[end]} - parts_[part].sentences[first];
  }
  std::int64_t length(const Document& document) const { return length(document.part, document.first, document.end); }

 private:
  std::vector<Part> parts_;
  std::vector<std::int64_t> starts_;  // the number of each part's first document; then of all
  std::int64_t tokens_ = 0;
};

}  // namespace fastbert
