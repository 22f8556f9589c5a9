// Attention for training on a CPU.
#include <cmath>

#include "attention.h"
#include "bindings.h"

using namespace pybind11::literals;

namespace {

using fastbert::Heads;

// (T, H, D) float32 that is written or read where it lies.
template <typename T>
Heads<T> heads_of(py::array_t<float>& array, const fastbert::AttentionCall& call, bool is_output) {
  const auto unit = static_cast<py::ssize_t>(sizeof(float));
  if (array.ndim() != 3 || array.shape(0) != call.tokens || array.shape(1) != call.heads ||
      array.shape(2) != call.head_dim)
    throw py::value_error("tensors must be (tokens, heads, head_dim), all the same");
  if (array.size() == 0) return {nullptr, 0, 0};
  if (array.strides(0) % unit != 0 || array.strides(1) % unit != 0 || (array.shape(2) > 1 && array.strides(2) != unit))
    throw py::value_error("a head's features must lie side by side");
  T* data = is_output ? array.mutable_data() : const_cast<float*>(array.data());
  return {data, array.strides(0) / unit, array.strides(1) / unit};
}

struct Arguments {
  py::array_t<float> q, k, v;
  Array<std::int32_t> cu_seqlens;
  float scale;
  bool causal;
  std::uint32_t threshold;
  float keep_scale;
  std::int64_t seed;
  std::uint32_t stream;
  int threads;
};

fastbert::AttentionCall call_of(Arguments& from) {
  if (from.q.ndim() != 3) throw py::value_error("q must be (tokens, heads, head_dim)");
  if (from.cu_seqlens.ndim() != 1 || from.cu_seqlens.size() < 1) throw py::value_error("cu_seqlens must be (batch + 1,)");
  if (from.threshold > 256) throw py::value_error("the threshold must be at most 256");
  fastbert::AttentionCall call{};
  call.tokens = from.q.shape(0);
  call.heads = from.q.shape(1);
  call.head_dim = from.q.shape(2);
  call.q = heads_of<const float>(from.q, call, false);
  call.k = heads_of<const float>(from.k, call, false);
  call.v = heads_of<const float>(from.v, call, false);
  call.cu_seqlens = from.cu_seqlens.data();
  call.sequences = from.cu_seqlens.size() - 1;
  const std::int32_t* end = call.cu_seqlens + call.sequences;
  if (*call.cu_seqlens != 0 || *end != call.tokens || !std::is_sorted(call.cu_seqlens, end + 1))
    throw py::value_error("cu_seqlens must rise from 0 to the number of tokens");
  call.scale = from.scale;
  call.causal = from.causal;
  call.threshold = from.threshold;
  call.keep_scale = from.keep_scale;
  call.seed = static_cast<std::uint64_t>(from.seed);
  call.stream = from.stream;
  call.threads = threads_or_all(from.threads);
  return call;
}

void check_lse(const Array<float>& lse, const fastbert::AttentionCall& call) {
  if (lse.ndim() != 2 || lse.shape(0) != call.heads || lse.shape(1) != call.tokens)
    throw py::value_error("lse must be (heads, tokens)");
}

void attention(Arguments& from, py::array_t<float> o, Array<float> lse) {
  const fastbert::AttentionCall call = call_of(from);
  check_lse(lse, call);
  const Heads<float> out = heads_of<float>(o, call, true);
  float* lse_out = lse.mutable_data();
  const py::gil_scoped_release release;
  fastbert::attention(call, out, lse_out);
}

void attention_backward(Arguments& from, py::array_t<float> grad, py::array_t<float> o, const Array<float>& lse,
                        py::array_t<float> dq, py::array_t<float> dk, py::array_t<float> dv) {
  const fastbert::AttentionCall call = call_of(from);
  check_lse(lse, call);
  const Heads<const float> of_grad = heads_of<const float>(grad, call, false), of_o = heads_of<const float>(o, call, false);
  const Heads<float> of_q = heads_of<float>(dq, call, true), of_k = heads_of<float>(dk, call, true),
                     of_v = heads_of<float>(dv, call, true);
  const float* lse_in = lse.data();
  const py::gil_scoped_release release;
  fastbert::attention_backward(call, of_grad, of_o, lse_in, of_q, of_k, of_v);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("can_attend", &fastbert::can_attend, "Whether this CPU has the instructions for attention.");

  py::class_<Arguments>(m, "AttentionCall", "What attention and its backward are both called with.")
      .def(py::init([](py::array_t<float> q, py::array_t<float> k, py::array_t<float> v, Array<std::int32_t> cu_seqlens,
                       float scale, bool causal, std::uint32_t threshold, float keep_scale, std::int64_t seed,
                       std::uint32_t stream, int threads) {
             return Arguments{std::move(q), std::move(k), std::move(v), std::move(cu_seqlens), scale, causal,
                              threshold,    keep_scale,   seed,         stream,                threads};
           }),
           "q"_a, "k"_a, "v"_a, "cu_seqlens"_a, "scale"_a, "causal"_a, "threshold"_a, "keep_scale"_a, "seed"_a,
           "stream"_a, "threads"_a,
           R"doc(q, k, v: (T, H, D) float32, packed, features side by side.  cu_seqlens: (B + 1,) int32, from 0 to T.
threshold, seed, stream: of keep_mask; 0 for no dropout.  threads: 0 for as many as there are cores.)doc")
      .def("forward", &attention, "o"_a.noconvert(), "lse"_a.noconvert(),
           R"doc(Writes `fastbert.reference.attention`'s output, (T, H, D), and lse, (H, T), float32.

Raises:
    ValueError: if shapes do not fit together, or cu_seqlens does not rise from 0 to T.)doc")
      .def("backward", &attention_backward, "grad"_a, "o"_a, "lse"_a, "dq"_a.noconvert(), "dk"_a.noconvert(),
           "dv"_a.noconvert(),
           R"doc(Writes the gradients of q, k and v, (T, H, D) float32, from that of o.

Raises:
    ValueError: as `forward`.)doc");
}
