// The module, and all of it but the encoder. What begins with bindings knows Python; the rest of csrc/ is plain C++17.
#include "bindings.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "batches.h"
#include "corpus.h"
#include "masking.h"
#include "packing.h"
#include "philox.h"
#include "sampling.h"

using namespace pybind11::literals;

namespace {

std::tuple<Array<std::int64_t>, Array<std::int32_t>, Array<std::int64_t>> pack_lengths(
    const py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>& lengths, std::int64_t padded_length) {
  if (lengths.ndim() != 1) throw py::value_error("lengths must have one dimension");
  const std::int64_t batch = lengths.size();
  const std::int64_t tokens = fastbert::total_tokens(lengths.data(), batch, padded_length);
  Array<std::int64_t> indices(tokens), position_ids(tokens);
  Array<std::int32_t> cu_seqlens(batch + 1);
  {
    const std::int64_t* in = lengths.data();
    std::int64_t *indices_out = indices.mutable_data(), *position_ids_out = position_ids.mutable_data();
    std::int32_t* cu_seqlens_out = cu_seqlens.mutable_data();
    py::gil_scoped_release release;
    fastbert::pack_lengths(in, batch, padded_length, indices_out, cu_seqlens_out, position_ids_out);
  }
  return {indices, cu_seqlens, position_ids};
}

Array<bool> keep_mask(std::int64_t heads, std::int64_t first_row, std::int64_t rows, std::int64_t cols, int threshold,
                      std::int64_t seed, int stream, bool scores, const std::optional<Array<std::int64_t>>& numbers) {
  if (heads < 0 || first_row < 0 || rows < 0 || cols < 0) throw py::value_error("sizes must not be negative");
  if (threshold < 0 || threshold > 256) throw py::value_error("threshold must be in [0, 256]");
  if (numbers && (numbers->ndim() != 1 || numbers->size() < first_row + rows))
    throw py::value_error("numbers must have one dimension and reach to the last row");
  Array<bool> mask({heads, rows, cols});
  {
    auto* out = reinterpret_cast<std::uint8_t*>(mask.mutable_data());
    const std::int64_t* in = numbers ? numbers->data() : nullptr;
    py::gil_scoped_release release;
    fastbert::keep_mask(out, heads, first_row, rows, cols, static_cast<std::uint32_t>(threshold),
                        static_cast<std::uint64_t>(seed), static_cast<std::uint32_t>(stream), scores, in);
  }
  return mask;
}

// A vector becomes an array without a copy.
template <typename T>
Array<T> own(std::vector<T>&& values) {
  auto* kept = new std::vector<T>(std::move(values));
  const py::capsule owner(kept, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return Array<T>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

fastbert::Masking masking_of(const std::string& unit, double rate, double replace_by_mask, double replace_by_random,
                             std::int64_t max_predictions, double span_p, int max_span) {
  using Unit = fastbert::Masking::Unit;
  fastbert::Masking masking;
  masking.unit = choose<Unit>("unit", unit, {{"token", Unit::token}, {"whole-word", Unit::word}, {"span", Unit::span}});
  masking.rate = rate;
  masking.replace_by_mask = replace_by_mask;
  masking.replace_by_random = replace_by_random;
  masking.max_predictions = max_predictions;
  masking.span_p = span_p;
  masking.max_span = max_span;
  masking.check();
  return masking;
}

using PartArrays = std::tuple<py::array, Array<std::uint32_t>, Array<std::uint32_t>>;

class Sampler {
 public:
  Sampler(std::vector<PartArrays> parts, const Array<std::uint8_t>& kinds, std::int32_t cls, std::int32_t sep, std::int32_t mask,
          const std::string& form, std::int64_t max_length, double short_probability, std::int64_t window_tokens,
          std::int64_t seed, std::int64_t static_copies, const std::string& objective, const fastbert::Masking& masking,
          int threads)
      : arrays_(std::move(parts)),
        vocabulary_(kinds.data(), kinds.size(), mask),
        tokens_{cls, sep},
        masking_(masking),
        threads_(threads_or_all(threads)) {
    using Form = fastbert::Sampling::Form;
    using fastbert::Objective;
    sampling_.form = choose<Form>("form", form, {{"pairs", Form::pairs}, {"full-sentences", Form::full_sentences}});
    sampling_.max_length = max_length;
    sampling_.short_probability = short_probability;
    sampling_.window_tokens = window_tokens;
    sampling_.seed = static_cast<std::uint64_t>(seed);
    sampling_.static_copies = static_copies;
    sampling_.check();
    objective_ = choose<Objective>("objective", objective,
                                   {{"masked", Objective::masked}, {"left-to-right", Objective::left_to_right}});
    for (const std::int32_t id : {cls, sep}) {
      if (id < 0 || id >= kinds.size()) throw py::value_error("a special token is not in the vocabulary");
    }
    std::vector<fastbert::Part> borrowed;
    for (const auto& [tokens, sentences, documents] : arrays_) {
      const bool wide = py::isinstance<py::array_t<std::uint32_t>>(tokens);
      if (!wide && !py::isinstance<py::array_t<std::uint16_t>>(tokens)) throw py::value_error("tokens must be uint16 or uint32");
      if (tokens.ndim() != 1 || (tokens.flags() & py::array::c_style) == 0) throw py::value_error("tokens must be contiguous");
      if (sentences.size() < 1 || documents.size() < 1) throw py::value_error("offsets must have at least one element");
      borrowed.push_back({tokens.data(), wide, sentences.data(), documents.data(), tokens.size(), sentences.size() - 1,
                          documents.size() - 1});
    }
    py::gil_scoped_release release;
    corpus_ = std::make_unique<fastbert::Corpus>(std::move(borrowed), threads_);
  }

  std::int64_t documents() const { return corpus_->documents(); }

  fastbert::Plan plan(std::int64_t epoch, std::int64_t first_document) const {
    py::gil_scoped_release release;
    return fastbert::plan(*corpus_, sampling_, epoch, first_document, threads_);
  }

  py::dict batch(const fastbert::Plan& plan, const Array<std::int64_t>& picks) const {
    std::int64_t length = 0;
    std::uint32_t longest = 0;
    for (py::ssize_t i = 0; i < picks.size(); ++i) {
      const std::int64_t pick = picks.at(i);
      if (pick < 0 || pick >= static_cast<std::int64_t>(plan.sequences.size())) throw py::index_error("no such sequence");
      length += plan.sequences[static_cast<std::size_t>(pick)].length;
      longest = std::max(longest, plan.sequences[static_cast<std::size_t>(pick)].length);
    }
    if (length >= std::int64_t{1} << 31) throw py::value_error("a batch holds less than 2^31 tokens");
    const bool pairs = sampling_.form == fastbert::Sampling::Form::pairs;
    Array<std::int64_t> input_ids(length), token_type_ids(length), position_ids(length), labels(length),
        next_sentence_label(pairs ? picks.size() : 0);
    Array<std::int32_t> cu_seqlens(picks.size() + 1);
    const fastbert::Batch out{input_ids.mutable_data(), token_type_ids.mutable_data(), position_ids.mutable_data(),
                              labels.mutable_data(),    cu_seqlens.mutable_data(),     next_sentence_label.mutable_data()};
    std::vector<std::int64_t> rows;
    {
      const std::int64_t* in = picks.data();
      const std::int64_t count = picks.size();
      py::gil_scoped_release release;
      rows = fastbert::write_batch(*corpus_, sampling_, vocabulary_, tokens_, masking_, objective_, plan, in, count, threads_, out);
    }
    py::dict batch("input_ids"_a = input_ids, "token_type_ids"_a = token_type_ids, "position_ids"_a = position_ids,
                   "labels"_a = labels, "cu_seqlens"_a = cu_seqlens, "max_seqlen"_a = longest, "label_rows"_a = own(std::move(rows)));
    if (pairs) batch["next_sentence_label"] = next_sentence_label;
    return batch;
  }

 private:
  std::vector<PartArrays> arrays_;  // keeps what the corpus borrows
  std::unique_ptr<fastbert::Corpus> corpus_;
  fastbert::Sampling sampling_;
  fastbert::Vocabulary vocabulary_;
  fastbert::Tokens tokens_;
  fastbert::Masking masking_;
  fastbert::Objective objective_;
  int threads_;
};

Array<std::int64_t> lengths_of(const fastbert::Plan& plan) {
  Array<std::int64_t> lengths(static_cast<py::ssize_t>(plan.sequences.size()));
  std::transform(plan.sequences.begin(), plan.sequences.end(), lengths.mutable_data(),
                 [](const fastbert::Sequence& sequence) { return std::int64_t{sequence.length}; });
  return lengths;
}

std::tuple<Array<std::int64_t>, Array<std::int64_t>> group_into_batches(const Array<std::int64_t>& lengths, std::int64_t budget,
                                                                       const std::string& grouping, std::int64_t seed,
                                                                       std::int64_t epoch, std::int64_t index) {
  using fastbert::Grouping;
  const auto how = choose<Grouping>("grouping", grouping, {{"packed", Grouping::packed}, {"by-length", Grouping::by_length}});
  fastbert::Batches batches;
  {
    const std::int64_t* in = lengths.data();
    const std::int64_t count = lengths.size();
    py::gil_scoped_release release;
    batches = fastbert::group_into_batches(in, count, budget, how, static_cast<std::uint64_t>(seed),
                                           static_cast<std::uint64_t>(epoch), static_cast<std::uint64_t>(index));
  }
  return {own(std::move(batches.order)), own(std::move(batches.offsets))};
}

std::tuple<Array<std::int64_t>, Array<std::int64_t>, Array<std::int64_t>> corrupt(
    const Array<std::int64_t>& ids, const Array<std::int64_t>& cu_seqlens, const Array<std::uint8_t>& kinds, std::int32_t mask,
    const fastbert::Masking& masking, std::int64_t seed, std::int64_t epoch, std::int64_t first_index,
    const std::optional<Array<std::uint8_t>>& unit_starts, int threads) {
  const std::int64_t tokens = ids.size(), count = cu_seqlens.size() - 1;
  if (count < 0) throw py::value_error("cu_seqlens must have at least one element");
  if (unit_starts && unit_starts->size() != tokens) throw py::value_error("unit_starts must be as long as ids");
  const fastbert::Vocabulary vocabulary(kinds.data(), kinds.size(), mask);
  Array<std::int64_t> corrupted(tokens), labels(tokens);
  std::vector<std::int64_t> rows;
  {
    const std::int64_t *in = ids.data(), *bounds = cu_seqlens.data();
    const std::uint8_t* starts = unit_starts ? unit_starts->data() : nullptr;
    std::int64_t *ids_out = corrupted.mutable_data(), *labels_out = labels.mutable_data();
    const int workers = threads_or_all(threads);
    py::gil_scoped_release release;
    rows = fastbert::corrupt(vocabulary, masking, in, tokens, bounds, count, static_cast<std::uint64_t>(seed),
                             static_cast<std::uint64_t>(epoch), static_cast<std::uint64_t>(first_index), starts, workers,
                             ids_out, labels_out);
  }
  return {corrupted, labels, own(std::move(rows))};
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Host-side helpers of fastbert that are too slow in Python.";

  m.def("pack_lengths", &pack_lengths, "lengths"_a, "padded_length"_a,
        R"doc(Where the tokens of right-padded sequences lie, without the padding.

Args:
    lengths: (B,) tokens in each sequence, each in [0, padded_length].
    padded_length: tokens in a padded row.

Returns:
    indices: (T,) int64, each token's place in the flattened (B, padded_length) rectangle.
    cu_seqlens: (B + 1,) int32, where each sequence starts among the T tokens, and T.
    position_ids: (T,) int64, each token's place in its own sequence.

Raises:
    ValueError: if a length is out of range, or T is 2^31 or more.)doc");

  m.def("keep_mask", &keep_mask, "heads"_a, "first_row"_a, "rows"_a, "cols"_a, "threshold"_a, "seed"_a, "stream"_a,
        "scores"_a = false, "numbers"_a = py::none(),
        R"doc(The dropout mask that `fastbert.reference.keep_mask` specifies, (heads, rows, cols), True where kept.

Raises:
    ValueError: if a size is negative, the threshold is not in [0, 256], or numbers is too short.)doc");

  bind_attention(m);
  bind_encoder(m);

  py::class_<fastbert::Masking>(m, "Masking", "How tokens are chosen for prediction, and what becomes of them.")
      .def(py::init(&masking_of), py::kw_only(), "unit"_a = "token", "rate"_a = 0.15, "replace_by_mask"_a = 0.8,
           "replace_by_random"_a = 0.1, "max_predictions"_a = 0, "span_p"_a = 0.2, "max_span"_a = 10);

  py::class_<fastbert::Plan>(m, "Plan", "The sequences of some documents of an epoch, shuffled, before they are written.")
      .def("__len__", [](const fastbert::Plan& plan) { return plan.sequences.size(); })
      .def_readonly("epoch", &fastbert::Plan::epoch)
      .def_readonly("first_document", &fastbert::Plan::first_document)
      .def_readonly("next_document", &fastbert::Plan::next_document)
      .def_property_readonly("lengths", &lengths_of, "(sequences,) int64, tokens, special ones included.");

  py::class_<Sampler>(m, "Sampler", "Sequences for pretraining from a token store. Safe to use from several threads.")
      .def(py::init<std::vector<PartArrays>, const Array<std::uint8_t>&, std::int32_t, std::int32_t, std::int32_t, const std::string&,
                    std::int64_t, double, std::int64_t, std::int64_t, std::int64_t, const std::string&,
                    const fastbert::Masking&, int>(),
           "parts"_a, "kinds"_a, "cls"_a, "sep"_a, "mask"_a, py::kw_only(), "form"_a, "max_length"_a, "short_probability"_a,
           "window_tokens"_a, "seed"_a, "static_copies"_a, "objective"_a, "masking"_a, "threads"_a = 0)
      .def_property_readonly("documents", &Sampler::documents)
      .def("plan", &Sampler::plan, "epoch"_a, "first_document"_a)
      .def("batch", &Sampler::batch, "plan"_a, "picks"_a);

  m.def("group_into_batches", &group_into_batches, "lengths"_a, "budget"_a, py::kw_only(), "grouping"_a, "seed"_a, "epoch"_a,
        "index"_a,
        R"doc(Sequences that share a batch of at most `budget` tokens: those of batch i are order[offsets[i]:offsets[i + 1]].

Raises:
    ValueError: if a length is not in [1, budget].)doc");

  m.def("corrupt", &corrupt, "ids"_a, "cu_seqlens"_a, "kinds"_a, "mask"_a, "masking"_a, py::kw_only(), "seed"_a, "epoch"_a,
        "first_index"_a = 0, "unit_starts"_a = py::none(), "threads"_a = 0,
        R"doc(Masked-LM corruption of packed sequences: the corrupted ids, the labels, and which tokens have one.

Raises:
    ValueError: if an id is not in the vocabulary, or cu_seqlens does not rise from 0 to the number of tokens.)doc");
}
