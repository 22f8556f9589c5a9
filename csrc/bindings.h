#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Adds the encoder, and what keeps a copy of weights from being stale.
void bind_encoder(py::module_& m);

// Adds attention for training.
void bind_attention(py::module_& m);

inline int threads_or_all(int threads) {
  if (threads < 0) throw py::value_error("threads must not be negative");
  return threads > 0 ? threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

template <typename Enum>
Enum choose(const std::string& name, const std::string& value, const std::vector<std::pair<const char*, Enum>>& choices) {
  std::string known;
  for (const auto& [text, choice] : choices) {
    if (value == text) return choice;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  throw py::value_error(name + " must be one of " + known + ", but is " + value);
}
