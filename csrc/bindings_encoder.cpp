// Layers of an encoder for inference on a CPU, and what tells that weights were written to.
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "encoder.h"

using namespace pybind11::literals;

namespace {

std::uint64_t some_words(const std::vector<std::uintptr_t>& addresses, const std::vector<std::size_t>& sizes) {
  if (addresses.size() != sizes.size()) throw py::value_error("there must be as many sizes as addresses");
  constexpr std::size_t kWords = 8;
  std::uint64_t digest = 14695981039346656037u;  // FNV-1a's
  for (std::size_t i = 0; i < addresses.size(); ++i) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(addresses[i]);
    const std::size_t size = std::min<std::size_t>(sizes[i], 4), last = sizes[i] - size;
    for (std::size_t w = 0; w < kWords; ++w) {
      std::uint32_t word = 0;
      std::memcpy(&word, bytes + last * w / (kWords - 1), size);
      digest = (digest ^ word) * 1099511628211u;
    }
  }
  return digest;
}

// Layers of an encoder, and the sizes that their weights must have.
class PyEncoder {
 public:
  PyEncoder(const std::string& precision, const fastbert::EncoderSizes& sizes)
      : sizes_(sizes), encoder_(fastbert::make_encoder(precision_of(precision), sizes)) {}

  static fastbert::Precision precision_of(const std::string& name) {
    return choose<fastbert::Precision>("precision", name,
                                       {{"fp32", fastbert::Precision::fp32},
                                        {"bf16", fastbert::Precision::bf16},
                                        {"int8", fastbert::Precision::int8}});
  }

  using Weight = std::optional<Array<float>>;
  void add_layer(const std::vector<Weight>& weights) {
    const py::ssize_t N = sizes_.hidden, context = sizes_.heads * sizes_.head_dim, inner = sizes_.inner;
    if (weights.size() != 16) throw py::value_error("a layer has 16 weights");
    auto next = weights.begin();
    const auto vector = [&next](py::ssize_t size, bool may_miss) -> const float* {
      const Weight& weight = *next++;
      if (!weight && may_miss) return nullptr;
      if (!weight || weight->ndim() != 1 || weight->shape(0) != size) throw py::value_error("a vector of another size");
      return weight->data();
    };
    const auto linear = [&](py::ssize_t rows, py::ssize_t columns) {
      const Weight& weight = *next++;
      if (!weight || weight->ndim() != 2 || weight->shape(0) != rows || weight->shape(1) != columns)
        throw py::value_error("a matrix of another size");
      return fastbert::LinearWeights{weight->data(), vector(rows, true)};
    };
    const auto norm = [&] {
      const float* weight = vector(N, false);
      return fastbert::NormWeights{weight, vector(N, false)};
    };
    fastbert::LayerWeights layer;
    layer.query = linear(context, N);
    layer.key = linear(context, N);
    layer.value = linear(context, N);
    layer.attention_out = linear(N, context);
    layer.attention_norm = norm();
    layer.inner = linear(inner, N);
    layer.out = linear(N, inner);
    layer.norm = norm();
    const py::gil_scoped_release release;
    encoder_->add_layer(layer);
  }

  void set_norm(const Array<float>& weight, const Array<float>& bias, float eps) {
    encoder_->set_norm(norm_of(weight, bias), eps);
  }

  Array<float> run(const Array<float>& hidden, const Array<std::int32_t>& cu_seqlens, const std::vector<int>& order,
                   bool first_only, int threads) {
    if (hidden.ndim() != 2 || hidden.shape(1) != sizes_.hidden)
      throw py::value_error("hidden must be (tokens, " + std::to_string(sizes_.hidden) + ")");
    fastbert::EncoderCall call;
    call.hidden = hidden.data();
    return run(call, hidden.shape(0), cu_seqlens, order, first_only, threads);
  }

  using Ids = Array<std::int64_t>;
  using Norm = std::tuple<Array<float>, Array<float>, float>;
  Array<float> embed_and_run(const std::vector<std::pair<py::array, Ids>>& parts, const std::optional<Norm>& norm,
                             const Array<std::int32_t>& cu_seqlens, const std::vector<int>& order, bool first_only,
                             int threads) {
    if (parts.empty()) throw py::value_error("there must be a table");
    const py::ssize_t tokens = parts.front().second.size();
    fastbert::Embeddings embeddings;
    for (const auto& [rows, ids] : parts) {
      const bool is_bf16 = rows.dtype().is(py::dtype::of<std::int16_t>());
      if (rows.ndim() != 2 || rows.shape(1) != sizes_.hidden || !(is_bf16 || rows.dtype().is(py::dtype::of<float>())))
        throw py::value_error("a table must be (rows, " + std::to_string(sizes_.hidden) + "), float32 or bfloat16 as int16");
      if (rows.strides(0) % rows.itemsize() != 0 || (rows.shape(1) > 1 && rows.strides(1) != rows.itemsize()))
        throw py::value_error("a table's features must lie side by side");
      if (ids.ndim() != 1 || ids.size() != tokens) throw py::value_error("each table must have an id for each token");
      embeddings.parts.push_back({{rows.data(), is_bf16, rows.shape(0), rows.strides(0) / rows.itemsize()}, ids.data()});
    }
    if (norm) {
      embeddings.norm = norm_of(std::get<0>(*norm), std::get<1>(*norm));
      embeddings.eps = std::get<2>(*norm);
    }
    fastbert::EncoderCall call;
    call.embeddings = &embeddings;
    return run(call, tokens, cu_seqlens, order, first_only, threads);
  }

 private:
  fastbert::NormWeights norm_of(const Array<float>& weight, const Array<float>& bias) const {
    for (const Array<float>& of : {weight, bias})
      if (of.ndim() != 1 || of.shape(0) != sizes_.hidden) throw py::value_error("a vector of another size");
    return {weight.data(), bias.data()};
  }

  Array<float> run(fastbert::EncoderCall call, py::ssize_t tokens, const Array<std::int32_t>& cu_seqlens,
                   const std::vector<int>& order, bool first_only, int threads) {
    if (cu_seqlens.ndim() != 1 || cu_seqlens.size() < 1) throw py::value_error("cu_seqlens must be (batch + 1,)");
    call.cu_seqlens = cu_seqlens.data();
    call.sequences = cu_seqlens.size() - 1;
    const std::int32_t* end = call.cu_seqlens + call.sequences;
    if (*call.cu_seqlens != 0 || *end != tokens || !std::is_sorted(call.cu_seqlens, end + 1))
      throw py::value_error("cu_seqlens must rise from 0 to the number of tokens");
    const auto N = static_cast<py::ssize_t>(sizes_.hidden);
    Array<float> out({first_only ? static_cast<py::ssize_t>(call.sequences) : tokens, N});
    call.first_only = first_only;
    call.out = out.mutable_data();
    call.threads = threads_or_all(threads);
    const py::gil_scoped_release release;
    encoder_->run(call, order);
    return out;
  }

  fastbert::EncoderSizes sizes_;
  std::unique_ptr<fastbert::Encoder> encoder_;
};

}  // namespace

void bind_encoder(py::module_& m) {
  m.def(
      "can_encode", [](const std::string& precision) { return fastbert::can_encode(PyEncoder::precision_of(precision)); },
      "precision"_a, "Whether this CPU has the instructions for an Encoder of that precision: fp32, bf16 or int8.");

  m.def("some_words", &some_words, "addresses"_a, "sizes"_a,
        R"doc(A digest of a few words of each of these pieces of memory, which must be there.

Raises:
    ValueError: if there are not as many sizes as addresses.)doc");

  py::class_<PyEncoder>(m, "Encoder", "BERT's layers for inference, over weights in the order in which they are read.")
      .def(py::init([](const std::string& precision, std::int64_t hidden, std::int64_t heads, std::int64_t head_dim,
                       std::int64_t inner, float eps, float scale, bool tanh_gelu, bool norm_first) {
             return PyEncoder(precision, {hidden, heads, head_dim, inner, eps, scale, tanh_gelu, norm_first});
           }),
           py::kw_only(), "precision"_a, "hidden"_a, "heads"_a, "head_dim"_a, "inner"_a, "eps"_a, "scale"_a,
           "tanh_gelu"_a, "norm_first"_a = false)
      .def("add_layer", &PyEncoder::add_layer, "weights"_a,
           R"doc(Copies the weights of one more layer.

Args:
    weights: float32, of query, key, value and the attention's output: weight and bias of each; of LayerNorm: weight
        and bias; of the feed-forward's two products and its LayerNorm likewise. A product's bias may be None.

Raises:
    ValueError: if one has another size.)doc")
      .def("set_norm", &PyEncoder::set_norm, "weight"_a, "bias"_a, "eps"_a,
           R"doc(Copies the weights, (N,) float32, of a LayerNorm behind the last layer.

Raises:
    ValueError: if one has another size.)doc")
      .def("run",
           py::overload_cast<const Array<float>&, const Array<std::int32_t>&, const std::vector<int>&, bool, int>(
               &PyEncoder::run),
           "hidden"_a, "cu_seqlens"_a, "order"_a, "first_only"_a, "threads"_a,
           R"doc(All layers.

Args:
    hidden: (T, N) float32, packed.  cu_seqlens: (B + 1,) int32, where each sequence starts, and T.
    order: which layer runs when; one may run several times.
    first_only: return (B, N), each sequence's first token, zeros for an empty one, instead of (T, N).
    threads: 0 for as many as there are cores.

Raises:
    ValueError: if shapes do not fit together, or cu_seqlens does not rise from 0 to T.)doc")
      .def("embed_and_run", &PyEncoder::embed_and_run, "parts"_a, "norm"_a, "cu_seqlens"_a, "order"_a, "first_only"_a,
           "threads"_a,
           R"doc(The sum of a row of each table, its LayerNorm, and all layers, as `run`.

Args:
    parts: tables, (_, N) float32, or bfloat16 as int16, which are not copied; each with its ids, (T,) int64.
    norm: weight and bias, (N,) float32, and epsilon, or None.

Raises:
    ValueError: if shapes do not fit together, or cu_seqlens does not rise from 0 to T.
    IndexError: if an id is not in its table.)doc");
}
