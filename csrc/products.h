// Matrix products y = x w^T for inference. Included once for each instruction set, behind simd.h.
//
// Both sides lie in the order in which they are read. Four bytes, a unit, are one float32, two bfloat16 or four 8-bit
// integers along the inner dimension; 16 units are a line of 64 bytes. Of x, a tile has up to ROWS rows; its lines stand
// row beside row, so that a row's next line is `rows` lines further on. Of w, a panel has COLUMNS rows of w: one unit of
// each, then the next of each. A tile times a panel takes one broadcast of x's unit for two vectors of w.


constexpr int AHEAD = 2048;  // bytes of a panel that are asked for before they are needed
constexpr int UNITS = 16, LINE = 64, COLUMNS = 2 * WIDTH, ROWS = FASTBERT_ROWS;

FASTBERT_INLINE std::int64_t rounded_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Lines of a row: two vectors are written at a time.
template <class P>
FASTBERT_INLINE std::int64_t lines_of(std::int64_t columns) {
  constexpr int OF_LINE = UNITS * P::PER_UNIT;
  return rounded_up(columns, std::max(OF_LINE, COLUMNS)) / OF_LINE;
}

// How rows of x are written, in tiles of equal size.
struct Tiles {
  std::int64_t rows, lines, tile_rows, tiles;

  Tiles(std::int64_t rows_, std::int64_t lines_) : rows(rows_), lines(lines_), tile_rows(1), tiles(0) {
    if (rows == 0) return;
    tiles = (rows + ROWS - 1) / ROWS;
    tile_rows = (rows + tiles - 1) / tiles;
    tiles = (rows + tile_rows - 1) / tile_rows;
  }
  std::int64_t step() const { return tile_rows * LINE; }  // from a row's line to its next
  std::int64_t tile(std::int64_t t) const { return t * lines * step(); }
  std::int64_t row(std::int64_t r) const { return tile(r / tile_rows) + r % tile_rows * LINE; }
};

// A row of a tile, and its number among all.
struct Place {
  std::int64_t row, tile, of_tile;
};

// Of 8-bit rows: x = scale (q), and 128 times the sum of q, for weights are stored with 128 added.
struct RowScale {
  float scale;
  std::int32_t offset;
};

struct Float32 {
  static constexpr int PER_UNIT = 1;
  static constexpr std::uint32_t ZEROS = 0;  // of weights
  static constexpr bool SCALED = false, ROUNDED = false;
  using Sums = Floats;

  FASTBERT_INLINE Sums dot(Sums sums, const char* w, const char* unit) {
    float x;
    __builtin_memcpy(&x, unit, sizeof(x));
    return multiply_add(all(x), load(reinterpret_cast<const float*>(w)), sums);
  }
  FASTBERT_INLINE Floats floats(Sums sums, RowScale, Floats) { return sums; }

  static std::uint32_t unit(const float* x, std::int64_t, float) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, x, sizeof(bits));
    return bits;
  }
  FASTBERT_INLINE Floats unit_of(const Floats (&x)[1]) { return x[0]; }
  // Two vectors of a row, COLUMNS of them from `column` on, to where they lie.
  FASTBERT_INLINE void put(char* row, std::int64_t step, std::int64_t column, Floats x0, Floats x1) {
    store(reinterpret_cast<float*>(row + column / UNITS * step) + column % UNITS, x0);
    store(reinterpret_cast<float*>(row + (column + WIDTH) / UNITS * step) + (column + WIDTH) % UNITS, x1);
  }
};

#if FASTBERT_BF16
struct BFloat16 {
  static constexpr int PER_UNIT = 2;
  static constexpr std::uint32_t ZEROS = 0;
  static constexpr bool SCALED = false, ROUNDED = true;
  using Sums = Floats;

  FASTBERT_INLINE Sums dot(Sums sums, const char* w, const char* unit) {
    std::int32_t x;
    __builtin_memcpy(&x, unit, sizeof(x));
    const __m512bh both = (__m512bh)_mm512_set1_epi32(x), weights = (__m512bh)_mm512_loadu_si512(w);
    return (Floats)_mm512_dpbf16_ps((__m512)sums, weights, both);
  }
  FASTBERT_INLINE Floats floats(Sums sums, RowScale, Floats) { return sums; }

  static std::uint32_t unit(const float* x, std::int64_t left, float) {
    std::uint32_t bits = 0;
    for (std::int64_t i = 0; i < 2 && i < left; ++i) {
      std::uint32_t wide;
      __builtin_memcpy(&wide, x + i, sizeof(wide));
      bits |= (wide + 0x7fffU + (wide >> 16 & 1U)) >> 16 << 16 * i;  // to nearest, ties to even
    }
    return bits;
  }
  FASTBERT_INLINE Floats unit_of(const Floats (&x)[2]) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x[0]));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x[1]));
    return (Floats)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  FASTBERT_INLINE void put(char* row, std::int64_t step, std::int64_t column, Floats x0, Floats x1) {
    const auto line = (__m512i)_mm512_cvtne2ps_pbh((__m512)x1, (__m512)x0);
    _mm512_storeu_si512(row + column / (2 * UNITS) * step, line);
  }
};
#endif

#if FASTBERT_VNNI
struct Int8 {
  static constexpr int PER_UNIT = 4;
  static constexpr std::uint32_t ZEROS = 0x80808080U;
  static constexpr bool SCALED = true, ROUNDED = true;
  using Sums = __m512i;

  FASTBERT_INLINE Sums dot(Sums sums, const char* w, const char* unit) {
    std::int32_t x;
    __builtin_memcpy(&x, unit, sizeof(x));
    return _mm512_dpbusd_epi32(sums, _mm512_loadu_si512(w), _mm512_set1_epi32(x));
  }
  FASTBERT_INLINE Floats floats(Sums sums, RowScale row, Floats column_scale) {
    const __m512i exact = _mm512_sub_epi32(sums, _mm512_set1_epi32(row.offset));
    return (Floats)_mm512_cvtepi32_ps(exact) * (column_scale * row.scale);
  }

  static std::uint32_t unit(const float* x, std::int64_t left, float inverse) {
    std::uint32_t bits = ZEROS;
    for (std::int64_t i = 0; i < 4 && i < left; ++i) {
      const auto q = static_cast<std::uint32_t>(static_cast<std::int32_t>(std::lrintf(x[i] * inverse)) + 128) & 0xffU;
      bits = (bits & ~(0xffU << 8 * i)) | q << 8 * i;
    }
    return bits;
  }
  // A whole row: rounded to 255 steps between its largest magnitude and minus that.
  static RowScale put_row(char* row, std::int64_t step, const float* x, std::int64_t columns, std::int64_t lines) {
    Floats most{}, nothing{};  // NaN where x is not finite
    for (std::int64_t c = 0; c < columns; c += WIDTH) {
      const Floats part = load_some(x + c, columns - c);
      most = larger(most, (Floats)_mm512_abs_ps((__m512)part));
      nothing += part * 0.0f;
    }
    const float largest = largest_of(most) + sum_of(nothing), inverse = largest > 0 ? 127 / largest : 0;
    __m512i sums = _mm512_setzero_si512();
    const __m512i ones = _mm512_set1_epi8(1);
    for (std::int64_t line = 0; line < lines; ++line) {
      __m512i bytes = _mm512_setzero_si512();
      const std::int64_t first = line * 4 * UNITS;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const std::int64_t at = first + i * WIDTH;
        if (at >= columns) continue;
        const Floats part = (at + WIDTH > columns ? load_some(x + at, columns - at) : load(x + at)) * inverse;
        const __m128i narrow = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)part));
        bytes = i == 0   ? _mm512_inserti32x4(bytes, narrow, 0)
                : i == 1 ? _mm512_inserti32x4(bytes, narrow, 1)
                : i == 2 ? _mm512_inserti32x4(bytes, narrow, 2)
                         : _mm512_inserti32x4(bytes, narrow, 3);
      }
      _mm512_storeu_si512(row + line * step, bytes);
      sums = _mm512_dpbusd_epi32(sums, ones, bytes);
    }
    return {largest / 127, 128 * _mm512_reduce_add_epi32(sums)};
  }
};
#endif

// One row of x to where it lies in a tile; columns beyond the last are zeros.
template <class P>
FASTBERT_INLINE RowScale put_row(char* row, std::int64_t step, const float* x, std::int64_t columns, std::int64_t lines) {
  if constexpr (P::SCALED) {
    return P::put_row(row, step, x, columns, lines);
  } else {
    const std::int64_t padded = lines * UNITS * P::PER_UNIT;
    std::int64_t c = 0;
    for (; c + COLUMNS <= columns; c += COLUMNS) P::put(row, step, c, load(x + c), load(x + c + WIDTH));
    for (; c < padded; c += COLUMNS) {
      const Floats x0 = load_some(x + c, columns - c), x1 = load_some(x + c + WIDTH, columns - c - WIDTH);
      P::put(row, step, c, x0, x1);
    }
    return {1, 0};
  }
}

// A tile of R rows times a panel: (R, 2) vectors.
template <class P, int R>
static __attribute__((noinline)) void multiply(const char* tile, const char* panel, std::int64_t lines,
                                               typename P::Sums* out) {
  typename P::Sums sums[R][2] = {};
  for (std::int64_t line = 0; line < lines; ++line) {
#pragma GCC unroll 4
    for (int unit = 0; unit < UNITS; ++unit) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const char* x = tile + r * LINE + 4 * unit;
        sums[r][0] = P::dot(sums[r][0], panel, x);
        sums[r][1] = P::dot(sums[r][1], panel + 4 * WIDTH, x);
      }
      __builtin_prefetch(panel + AHEAD);
      __builtin_prefetch(panel + AHEAD + LINE);
      panel += 4 * COLUMNS;
    }
    tile += R * LINE;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    out[2 * r] = sums[r][0];
    out[2 * r + 1] = sums[r][1];
  }
}

template <class P>
using Multiply = void (*)(const char*, const char*, std::int64_t, typename P::Sums*);

template <class P, std::size_t... R>
static constexpr std::array<Multiply<P>, sizeof...(R)> multiplies(std::index_sequence<R...>) {
  return {&multiply<P, static_cast<int>(R) + 1>...};
}

template <class P>
static Multiply<P> multiply_of(std::int64_t tile_rows) {
  static constexpr auto ALL = multiplies<P>(std::make_index_sequence<ROWS>());
  return ALL[static_cast<std::size_t>(tile_rows - 1)];
}

// Matrices with the same inner dimension, one below the other, in panels.
template <class P>
class Weights {
 public:
  Weights() = default;
  Weights(std::initializer_list<LinearWeights> matrices, std::int64_t rows, std::int64_t columns)
      : lines_(lines_of<P>(columns)),
        panels_(rounded_up(rows * static_cast<std::int64_t>(matrices.size()), COLUMNS) / COLUMNS),
        units_(static_cast<std::size_t>(panels_ * panel_bytes() / 4)),
        bias_(static_cast<std::size_t>(panels_ * COLUMNS)),
        scale_(bias_.size(), 1.0f) {
    std::fill_n(units_.data(), units_.size(), P::ZEROS);
    std::int64_t first = 0;
    for (const LinearWeights& matrix : matrices) {
      for (std::int64_t row = 0; row < rows; ++row) {
        put(first + row, matrix.weight + row * columns, columns);
        if (matrix.bias != nullptr) bias_[static_cast<std::size_t>(first + row)] = matrix.bias[row];
      }
      first += rows;
    }
  }

  std::int64_t panels() const { return panels_; }
  std::int64_t lines() const { return lines_; }
  const char* panel(std::int64_t p) const {
    return reinterpret_cast<const char*>(units_.data()) + p * panel_bytes();
  }
  const float* bias(std::int64_t p) const { return bias_.data() + p * COLUMNS; }
  const float* scale(std::int64_t p) const { return scale_.data() + p * COLUMNS; }

 private:
  std::int64_t panel_bytes() const { return lines_ * LINE * COLUMNS; }

  void put(std::int64_t row, const float* x, std::int64_t columns) {
    float inverse = 1;
    if constexpr (P::SCALED) {
      float largest = 0, nothing = 0;  // NaN where x is not finite
      for (std::int64_t c = 0; c < columns; ++c) {
        largest = std::max(largest, std::fabs(x[c]));
        nothing += x[c] * 0;
      }
      largest += nothing;
      inverse = largest > 0 ? 127 / largest : 0;
      scale_[static_cast<std::size_t>(row)] = largest / 127;
    }
    std::uint32_t* at = units_.data() + row / COLUMNS * panel_bytes() / 4 + row % COLUMNS;
    for (std::int64_t c = 0; c < columns; c += P::PER_UNIT) {
      *at = P::unit(x + c, columns - c, inverse);
      at += COLUMNS;
    }
  }

  std::int64_t lines_ = 0, panels_ = 0;
  Buffer<std::uint32_t> units_;
  std::vector<float> bias_, scale_;
};

// For each row and each panel of this member's share: done(place, column, two vectors of x w^T + bias).
template <class P, class Done>
static void product(const char* x, const RowScale* scales, const Tiles& tiles, const Weights<P>& w,
                    const Member& member, const Done& done) {
  const Multiply<P> multiply_tile = multiply_of<P>(tiles.tile_rows);
  alignas(LINE) typename P::Sums sums[2 * ROWS];
  const std::int64_t last = member.end(w.panels());
  for (std::int64_t p = member.begin(w.panels()); p < last; ++p) {
    const Floats bias0 = load(w.bias(p)), bias1 = load(w.bias(p) + WIDTH);
    const Floats scale0 = load(w.scale(p)), scale1 = load(w.scale(p) + WIDTH);
    for (std::int64_t t = 0; t < tiles.tiles; ++t) {
      multiply_tile(x + tiles.tile(t), w.panel(p), tiles.lines, sums);
      const std::int64_t row = t * tiles.tile_rows, rows = std::min(tiles.tile_rows, tiles.rows - row);
      for (std::int64_t r = 0; r < rows; ++r) {
        const RowScale scale = P::SCALED ? scales[row + r] : RowScale{1, 0};
        done(Place{row + r, t, r}, p * COLUMNS, P::floats(sums[2 * r], scale, scale0) + bias0,
             P::floats(sums[2 * r + 1], scale, scale1) + bias1);
      }
    }
  }
}
