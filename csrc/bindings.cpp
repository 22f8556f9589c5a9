// The only file that knows about Python. Everything else in csrc/ is plain C++17.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "packing.h"
#include "philox.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

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
}
