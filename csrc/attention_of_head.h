// Attention of one head for inference. Included once for each instruction set, behind products.h.

// A block of 32-bit words, WIDTH x WIDTH, with rows as columns.
FASTBERT_INLINE void transpose(const float* from, std::int64_t from_step, float* to, std::int64_t to_step) {
  Floats rows[WIDTH], mixed[WIDTH];
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i) rows[i] = load(from + i * from_step);
#pragma GCC unroll 4
  for (int done = 1; done < WIDTH; done *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH / 2; ++i) interleave(rows[i], rows[i + WIDTH / 2], mixed[2 * i], mixed[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) rows[i] = mixed[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i) store(to + i * to_step, rows[i]);
}

// What one thread needs for the attention of a sequence.
struct AttentionSpace {
  Buffer<char> query, keys, values, probabilities;
  Buffer<float> key_rows, scores;
};

// softmax(scale q k^T) v of one head of a sequence; q, k, v: (length, head_dim), from one row to the next `step`. The
// context takes the place of q.
template <class P>
class Attention {
 public:
  Attention(std::int64_t head_dim, float scale, AttentionSpace& space)
      : head_dim_(head_dim), scale_log2_(scale * 1.44269504f), lines_(lines_of<P>(head_dim)), space_(space) {}

  // Room for a sequence of that length, so that `run` asks for none.
  void reserve(std::int64_t length) {
    const std::int64_t padded = rounded_up(length, COLUMNS), key_lines = lines_of<P>(length);
    const std::int64_t value_columns = rounded_up(head_dim_, COLUMNS), bytes = LINE * ROWS;
    space_.query.reserve(static_cast<std::size_t>(bytes * lines_));
    space_.probabilities.reserve(static_cast<std::size_t>(bytes * key_lines));
    space_.scores.reserve(static_cast<std::size_t>(ROWS * padded));
    space_.key_rows.reserve(static_cast<std::size_t>(COLUMNS * UNITS * lines_));
    space_.keys.reserve(static_cast<std::size_t>(padded * lines_ * LINE));
    space_.values.reserve(static_cast<std::size_t>(key_lines * LINE * value_columns));
  }

  void run(float* q, const float* k, const float* v, std::int64_t step, std::int64_t length) {
    reserve(length);
    put_keys(k, step, length);
    put_values(v, step, length);
    const Tiles tiles(length, lines_);
    const Multiply<P> multiply_tile = multiply_of<P>(tiles.tile_rows);
    const std::int64_t key_panels = rounded_up(length, COLUMNS) / COLUMNS, padded = key_panels * COLUMNS;
    const std::int64_t value_panels = rounded_up(head_dim_, COLUMNS) / COLUMNS, key_lines = lines_of<P>(length);
    alignas(LINE) Floats sums[2 * ROWS];
    float inverse[ROWS];
    for (std::int64_t row = 0; row < length; row += tiles.tile_rows) {
      const std::int64_t rows = std::min(tiles.tile_rows, length - row);
      for (std::int64_t r = 0; r < rows; ++r)
        put_row<P>(space_.query.data() + r * LINE, tiles.step(), q + (row + r) * step, head_dim_, lines_);
      for (std::int64_t p = 0; p < key_panels; ++p) {
        multiply_tile(space_.query.data(), space_.keys.data() + p * lines_ * LINE * COLUMNS, lines_, sums);
        for (std::int64_t r = 0; r < rows; ++r) {
          store(space_.scores.data() + r * padded + p * COLUMNS, sums[2 * r]);
          store(space_.scores.data() + r * padded + p * COLUMNS + WIDTH, sums[2 * r + 1]);
        }
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        float* scores = space_.scores.data() + r * padded;
        inverse[r] = softmax(scores, length);
        put_row<P>(space_.probabilities.data() + r * LINE, tiles.step(), scores, length, key_lines);
      }
      for (std::int64_t p = 0; p < value_panels; ++p) {
        multiply_tile(space_.probabilities.data(), space_.values.data() + p * key_lines * LINE * COLUMNS, key_lines,
                      sums);
        const std::int64_t first = p * COLUMNS;
        for (std::int64_t r = 0; r < rows; ++r) {
          float* out = q + (row + r) * step + first;
          store_some(out, sums[2 * r] * inverse[r], head_dim_ - first);
          store_some(out + WIDTH, sums[2 * r + 1] * inverse[r], head_dim_ - first - WIDTH);
        }
      }
    }
  }

 private:
  // exp(scale (s - max)) in place; returns 1 / their sum.
  float softmax(float* s, std::int64_t length) const {
    Floats most = all(-std::numeric_limits<float>::infinity());
    std::int64_t c = 0;
    for (; c + WIDTH <= length; c += WIDTH) most = larger(load(s + c), most);
    float largest = largest_of(most);
    for (std::int64_t i = c; i < length; ++i) largest = std::max(largest, s[i]);
    Floats sum{};
    for (c = 0; c < length; c += WIDTH) {
      Floats p = exp2_of((load(s + c) - largest) * scale_log2_);
      if (c + WIDTH > length) p = only(p, length - c);
      store(s + c, p);
      sum += p;
    }
    return 1 / sum_of(sum);
  }

  // Panels of keys: the same unit of COLUMNS keys, then the next.
  void put_keys(const float* k, std::int64_t step, std::int64_t length) {
    const std::int64_t units = lines_ * UNITS;
    for (std::int64_t first = 0; first < length; first += COLUMNS) {
      float* rows = space_.key_rows.data();
      for (std::int64_t r = 0; r < COLUMNS; ++r) {
        if (first + r < length)
          put_row<P>(reinterpret_cast<char*>(rows + r * units), LINE, k + (first + r) * step, head_dim_, lines_);
        else
          std::memset(rows + r * units, 0, static_cast<std::size_t>(units) * sizeof(float));
      }
      float* panel = reinterpret_cast<float*>(space_.keys.data()) + first * units;
      for (std::int64_t u = 0; u < units; u += WIDTH)
        for (std::int64_t r = 0; r < COLUMNS; r += WIDTH)
          transpose(rows + r * units + u, units, panel + u * COLUMNS + r, COLUMNS);
    }
  }

  // Panels of features: a unit of neighbouring keys for COLUMNS features, then the next.
  void put_values(const float* v, std::int64_t step, std::int64_t length) {
    const std::int64_t units = lines_of<P>(length) * UNITS, panels = rounded_up(head_dim_, COLUMNS) / COLUMNS;
    for (std::int64_t p = 0; p < panels; ++p) {
      char* panel = space_.values.data() + p * units * COLUMNS * 4;
      for (std::int64_t u = 0; u < units; ++u) {
        for (std::int64_t half = 0; half < 2; ++half) {
          const std::int64_t column = p * COLUMNS + half * WIDTH;
          Floats of_keys[P::PER_UNIT];
          for (std::int64_t i = 0; i < P::PER_UNIT; ++i) {
            const std::int64_t key = u * P::PER_UNIT + i;
            of_keys[i] = key < length ? load_some(v + key * step + column, head_dim_ - column) : Floats{};
          }
          store(reinterpret_cast<float*>(panel + u * COLUMNS * 4) + half * WIDTH, P::unit_of(of_keys));
        }
      }
    }
  }

  std::int64_t head_dim_;
  float scale_log2_;
  std::int64_t lines_;
  AttentionSpace& space_;
};
