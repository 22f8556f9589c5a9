// Exercises the C++ core without Python, for the sanitizers: `make sanitize`.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "packing.h"
#include "philox.h"

namespace {

void check(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

void test_packing() {
  const std::vector<std::int64_t> lengths{3, 0, 2, 4};
  const std::int64_t tokens = fastbert::total_tokens(lengths.data(), 4, 4);
  check(tokens == 9, "total");
  std::vector<std::int64_t> indices(9), position_ids(9);
  std::vector<std::int32_t> cu_seqlens(5);
  fastbert::pack_lengths(lengths.data(), 4, 4, indices.data(), cu_seqlens.data(), position_ids.data());
  check(indices == std::vector<std::int64_t>{0, 1, 2, 8, 9, 12, 13, 14, 15}, "indices");
  check(position_ids == std::vector<std::int64_t>{0, 1, 2, 0, 1, 0, 1, 2, 3}, "position_ids");
  check(cu_seqlens == std::vector<std::int32_t>{0, 3, 3, 5, 9}, "cu_seqlens");
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{5}, std::int64_t{1} << 40}) {
    bool thrown = false;
    try {
      fastbert::total_tokens(&bad, 1, 4);
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    check(thrown, "a length out of range");
  }
}

void test_mask() {
  for (const std::int64_t cols : {0, 1, 15, 16, 17, 1023, 1024, 1025, 3000}) {
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(2 * 3 * cols) + 1, 7);
    fastbert::keep_mask(mask.data(), 2, 5, 3, cols, 26, 0x123456789abcdef0u, 4, cols % 2 == 1);
    check(mask.back() == 7, "nothing written past the end");
    mask.pop_back();
    for (const std::uint8_t kept : mask) check(kept <= 1, "a byte that is neither 0 nor 1");
  }
  const std::vector<std::int64_t> numbers{9, 6, 1, 5};
  std::vector<std::uint8_t> one(20), numbered(40);
  fastbert::keep_mask(numbered.data(), 1, 1, 2, 20, 128, 3, 2, false, numbers.data());
  fastbert::keep_mask(one.data(), 1, 6, 1, 20, 128, 3, 2, false);
  check(std::equal(one.begin(), one.end(), numbered.begin()), "row 1 counted as row 6");
  fastbert::keep_mask(one.data(), 1, 1, 1, 20, 128, 3, 2, false);
  check(std::equal(one.begin(), one.end(), numbered.begin() + 20), "row 2 counted as row 1");
  std::vector<std::uint8_t> none(64, 1);
  fastbert::keep_mask(none.data(), 1, 0, 2, 32, 256, 1, 0, false);
  check(none == std::vector<std::uint8_t>(64, 0), "threshold 256 keeps nothing");
}

}  // namespace

int main() {
  test_packing();
  test_mask();
  std::puts("2 passed, 0 failed");
}
