// Attention of one head for training: forward with dropout, and backward. Included once for each instruction set, behind
// products.h and attention_of_head.h.
//
// A head's rows are copied together, zeros behind them up to whole vectors; a block of queries at a time meets all keys.
// Scores are to the base 2, for queries are scaled by log2(e) as well.

constexpr std::int64_t BLOCK = 4 * ROWS;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// R rows of c, (_, V vectors), = or += a b: a's element (r, k) is a[r * a_row + k * a_column].
template <int R, int V>
static __attribute__((noinline)) void multiply_some(const float* a, std::int64_t a_row, std::int64_t a_column,
                                                    const float* b, std::int64_t b_step, std::int64_t inner, float* c,
                                                    std::int64_t c_step, bool add) {
  Floats sums[R][V] = {};
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = load(c + r * c_step + v * WIDTH);
  }
  for (std::int64_t k = 0; k < inner; ++k) {
    Floats row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = load(b + v * WIDTH);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats x = all(a[r * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(x, row[v], sums[r][v]);
    }
    a += a_column;
    b += b_step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + r * c_step + v * WIDTH, sums[r][v]);
}

using MultiplySome = void (*)(const float*, std::int64_t, std::int64_t, const float*, std::int64_t, std::int64_t, float*,
                              std::int64_t, bool);

template <int V, std::size_t... R>
static constexpr std::array<MultiplySome, sizeof...(R)> multiplies_some(std::index_sequence<R...>) {
  return {&multiply_some<static_cast<int>(R) + 1, V>...};
}

// The left side of a product; its transpose has row and column exchanged.
struct Left {
  const float* data;
  std::int64_t row, column;
};

// The right side: panels of COLUMNS columns, from one row to the next `step`.
struct Right {
  const float* data;
  std::int64_t step, panel;
};

// c, (rows, columns), from one row to the next `c_step`, = or += a b. columns: a multiple of WIDTH.
static void multiply_all(Left a, Right b, std::int64_t inner, float* c, std::int64_t c_step, std::int64_t rows,
                         std::int64_t columns, bool add = false) {
  static constexpr auto ONE = multiplies_some<1>(std::make_index_sequence<ROWS>());
  static constexpr auto TWO = multiplies_some<2>(std::make_index_sequence<ROWS>());
  const Tiles tiles(rows, 1);
  for (std::int64_t first = 0; first < columns; first += COLUMNS) {
    const auto& some = columns - first > WIDTH ? TWO : ONE;
    const float* panel = b.data + first / COLUMNS * b.panel;
    for (std::int64_t row = 0; row < rows; row += tiles.tile_rows) {
      const std::int64_t count = std::min(tiles.tile_rows, rows - row);
      some[static_cast<std::size_t>(count - 1)](a.data + row * a.row, a.row, a.column, panel, b.step, inner,
                                                c + row * c_step + first, c_step, add);
    }
  }
}

// All ones in the lanes that are kept.
FASTBERT_INLINE Ints kept(const std::uint8_t* mask) {
  std::uint8_t bytes __attribute__((vector_size(FASTBERT_WIDTH)));
  __builtin_memcpy(&bytes, mask, sizeof(bytes));
  return -__builtin_convertvector(bytes, Ints);
}

// One sequence's rows of a head.
struct HeadOf {
  std::int64_t head, start, length;
};

// What a thread needs for its heads, one after the other.
class TrainingAttention {
 public:
  explicit TrainingAttention(const AttentionCall& call) : call_(call), padded_(rounded_up(call.head_dim, WIDTH)) {}

  void forward(HeadOf it, Heads<float> o, float* lse) {
    reserve(it.length, {&q_, &k_, &v_, &k_columns_}, {&s_});
    copy(call_.q, it, call_.scale * LOG2_E, q_);
    copy(call_.k, it, 1, k_);
    copy(call_.v, it, 1, v_);
    put_columns(k_, it.length, k_columns_);
    for (std::int64_t first = 0; first < it.length; first += BLOCK) {
      const std::int64_t rows = std::min(BLOCK, it.length - first), keys = keys_of(it, first + rows);
      const std::int64_t columns = rounded_up(keys, WIDTH);
      multiply_all(rows_of(q_, first), columns_of(k_columns_), call_.head_dim, s_.data(), columns, rows, columns);
      for (std::int64_t r = 0; r < rows; ++r) {
        float* s = s_.data() + r * columns;
        const std::int64_t seen = keys_of(it, first + r + 1);
        const float largest = largest_in(s, seen), sum = exponentials(s, seen, columns, largest);
        lse[it.head * call_.tokens + it.start + first + r] = (largest + std::log2(sum)) * LN_2;
        scales_[r] = call_.keep_scale / sum;
        if (call_.threshold == 0) continue;
        draw(it, first + r, seen);
        for (std::int64_t c = 0; c < columns; c += WIDTH)
          store(s + c, of_bits(bits_of(load(s + c)) & kept(mask_.data() + c)));
      }
      multiply_all({s_.data(), columns, 1}, rows_as_right(v_, 0), keys, dq_.data(), padded_, rows, padded_);
      for (std::int64_t r = 0; r < rows; ++r) write(dq_.data() + r * padded_, scales_[r], o, it, first + r);
    }
  }

  void backward(HeadOf it, Heads<const float> grad, Heads<const float> o, const float* lse, Heads<float> dq,
                Heads<float> dk, Heads<float> dv) {
    reserve(it.length, {&q_, &k_, &v_, &grad_, &k_columns_, &v_columns_, &dk_, &dv_}, {&s_, &ds_});
    copy(call_.q, it, call_.scale * LOG2_E, q_);
    copy(call_.k, it, 1, k_);
    copy(call_.v, it, 1, v_);
    copy(grad, it, 1, grad_);
    put_columns(k_, it.length, k_columns_);
    put_columns(v_, it.length, v_columns_);
    std::fill_n(dk_.data(), it.length * padded_, 0.0f);
    std::fill_n(dv_.data(), it.length * padded_, 0.0f);
    for (std::int64_t first = 0; first < it.length; first += BLOCK) {
      const std::int64_t rows = std::min(BLOCK, it.length - first), keys = keys_of(it, first + rows);
      const std::int64_t columns = rounded_up(keys, WIDTH);
      multiply_all(rows_of(q_, first), columns_of(k_columns_), call_.head_dim, s_.data(), columns, rows, columns);
      multiply_all(rows_of(grad_, first), columns_of(v_columns_), call_.head_dim, ds_.data(), columns, rows, columns);
      for (std::int64_t r = 0; r < rows; ++r) {
        const float base2 = lse[it.head * call_.tokens + it.start + first + r] * LOG2_E;
        score_gradients(it, first + r, columns, base2, delta_of(it, first + r, grad, o), s_.data() + r * columns,
                        ds_.data() + r * columns);
      }
      multiply_all({ds_.data(), columns, 1}, rows_as_right(k_, 0), keys, dq_.data(), padded_, rows, padded_);
      for (std::int64_t r = 0; r < rows; ++r) write(dq_.data() + r * padded_, call_.scale, dq, it, first + r);
      multiply_all({ds_.data(), 1, columns}, rows_as_right(q_, first), rows, dk_.data(), padded_, keys, padded_, true);
      multiply_all({s_.data(), 1, columns}, rows_as_right(grad_, first), rows, dv_.data(), padded_, keys, padded_, true);
    }
    for (std::int64_t row = 0; row < it.length; ++row) {
      write(dk_.data() + row * padded_, LN_2, dk, it, row);
      write(dv_.data() + row * padded_, 1, dv, it, row);
    }
  }

 private:
  void reserve(std::int64_t length, std::initializer_list<Buffer<float>*> of_rows,
               std::initializer_list<Buffer<float>*> of_scores) {
    const std::int64_t rows = rounded_up(length, COLUMNS);
    for (Buffer<float>* of : of_rows) of->reserve(static_cast<std::size_t>(rows * padded_));
    for (Buffer<float>* of : of_scores) of->reserve(static_cast<std::size_t>(BLOCK * rows));
    dq_.reserve(static_cast<std::size_t>(BLOCK * padded_));
    mask_.reserve(static_cast<std::size_t>(rows));
  }

  // How many keys the rows before `end` see.
  std::int64_t keys_of(HeadOf it, std::int64_t end) const { return call_.causal ? end : it.length; }

  Left rows_of(const Buffer<float>& of, std::int64_t first) const { return {of.data() + first * padded_, padded_, 1}; }
  Right rows_as_right(const Buffer<float>& of, std::int64_t first) const {
    return {of.data() + first * padded_, padded_, COLUMNS};
  }
  Right columns_of(const Buffer<float>& of) const { return {of.data(), COLUMNS, padded_ * COLUMNS}; }

  void copy(Heads<const float> from, HeadOf it, float factor, Buffer<float>& to) const {
    for (std::int64_t row = 0; row < it.length; ++row) {
      const float* x = from.row(it.start + row, it.head);
      float* at = to.data() + row * padded_;
      for (std::int64_t c = 0; c < padded_; c += WIDTH)
        store(at + c, (c + WIDTH > call_.head_dim ? load_some(x + c, call_.head_dim - c) : load(x + c)) * factor);
    }
    const std::int64_t left = rounded_up(it.length, WIDTH) - it.length;
    std::fill_n(to.data() + it.length * padded_, left * padded_, 0.0f);
  }

  // Rows as columns, in panels.
  void put_columns(const Buffer<float>& rows, std::int64_t length, Buffer<float>& to) const {
    for (std::int64_t r = 0; r < length; r += WIDTH)
      for (std::int64_t c = 0; c < padded_; c += WIDTH)
        transpose(rows.data() + r * padded_ + c, padded_,
                  to.data() + r / COLUMNS * padded_ * COLUMNS + c * COLUMNS + r % COLUMNS, COLUMNS);
  }

  void write(const float* from, float factor, Heads<float> to, HeadOf it, std::int64_t row) const {
    float* at = to.row(it.start + row, it.head);
    for (std::int64_t c = 0; c < call_.head_dim; c += WIDTH)
      store_some(at + c, load(from + c) * factor, call_.head_dim - c);
  }

  void draw(HeadOf it, std::int64_t row, std::int64_t columns) {
    keep_row(mask_.data(), it.head, it.start + row, columns, call_.threshold, call_.seed, call_.stream, true);
  }

  static float largest_in(const float* s, std::int64_t count) {
    Floats most = all(-std::numeric_limits<float>::infinity());
    std::int64_t c = 0;
    for (; c + WIDTH <= count; c += WIDTH) most = larger(load(s + c), most);
    float largest = largest_of(most);
    for (; c < count; ++c) largest = std::max(largest, s[c]);
    return largest;
  }

  // 2^(s - largest) in place, zeros behind `count`; returns the sum.
  static float exponentials(float* s, std::int64_t count, std::int64_t columns, float largest) {
    Floats sum{};
    for (std::int64_t c = 0; c < columns; c += WIDTH) {
      Floats p = exp2_of(load(s + c) - largest);
      if (c + WIDTH > count) p = only(p, count - c);
      store(s + c, p);
      sum += p;
    }
    return sum_of(sum);
  }

  float delta_of(HeadOf it, std::int64_t row, Heads<const float> grad, Heads<const float> o) const {
    const float *x = grad.row(it.start + row, it.head), *y = o.row(it.start + row, it.head);
    Floats sum{};
    for (std::int64_t c = 0; c < call_.head_dim; c += WIDTH)
      sum = multiply_add(load_some(x + c, call_.head_dim - c), load_some(y + c, call_.head_dim - c), sum);
    return sum_of(sum);
  }

  // s: scores, becomes dropped probabilities.  ds: their gradients, becomes those of the scores.
  void score_gradients(HeadOf it, std::int64_t row, std::int64_t columns, float lse, float delta, float* s, float* ds) {
    const std::int64_t seen = keys_of(it, row + 1);
    if (call_.threshold != 0) draw(it, row, seen);
    for (std::int64_t c = 0; c < columns; c += WIDTH) {
      Floats p = exp2_of(load(s + c) - lse);
      if (c + WIDTH > seen) p = only(p, seen - c);
      Floats dropped = p, gradient = load(ds + c);
      if (call_.threshold != 0) {
        const Ints keep = kept(mask_.data() + c);
        dropped = of_bits(bits_of(p * call_.keep_scale) & keep);
        gradient = of_bits(bits_of(gradient * call_.keep_scale) & keep);
      }
      store(s + c, dropped);
      store(ds + c, p * (gradient - delta));
    }
  }

  const AttentionCall& call_;
  std::int64_t padded_;
  Buffer<float> q_, k_, v_, grad_, k_columns_, v_columns_, s_, ds_, dq_, dk_, dv_;
  Buffer<std::uint8_t> mask_;
  float scales_[BLOCK];
};

// Calls work(thread's own attention, head of a sequence) for all; long sequences first.
template <class Work>
static void for_each_head(const AttentionCall& call, const Work& work) {
  std::vector<std::int64_t> order;
  for (std::int64_t i = 0; i < call.sequences; ++i)
    if (call.cu_seqlens[i + 1] > call.cu_seqlens[i]) order.push_back(i);
  const auto length = [&call](std::int64_t i) { return call.cu_seqlens[i + 1] - call.cu_seqlens[i]; };
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return length(a) > length(b); });
  const std::int64_t count = static_cast<std::int64_t>(order.size()) * call.heads;
  std::mutex mutex;
  std::vector<std::unique_ptr<TrainingAttention>> idle;
  torch_parallel_for(count, call.threads, [&](std::int64_t i) {
    const std::int64_t sequence = order[static_cast<std::size_t>(i / call.heads)];
    std::unique_ptr<TrainingAttention> own;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!idle.empty()) {
        own = std::move(idle.back());
        idle.pop_back();
      }
    }
    if (own == nullptr) own = std::make_unique<TrainingAttention>(call);
    work(*own, HeadOf{i % call.heads, call.cu_seqlens[sequence], length(sequence)});
    const std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(std::move(own));
  });
}

static void attend(const AttentionCall& call, Heads<float> o, float* lse) {
  for_each_head(call, [&](TrainingAttention& own, HeadOf it) { own.forward(it, o, lse); });
}

static void attend_backward(const AttentionCall& call, Heads<const float> grad, Heads<const float> o, const float* lse,
                            Heads<float> dq, Heads<float> dk, Heads<float> dv) {
  for_each_head(call, [&](TrainingAttention& own, HeadOf it) { own.backward(it, grad, o, lse, dq, dk, dv); });
}
