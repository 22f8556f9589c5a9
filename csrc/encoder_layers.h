// BERT's layers for inference. Included once for each instruction set, behind simd.h and products.h.

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

// Padded with zeros: what is beyond the last feature stays zero.
struct Norm {
  Buffer<float> weight, bias;
  std::int64_t features = 0;
  float eps = 0;

  Norm(const NormWeights& from, std::int64_t features_, float eps_)
      : weight(static_cast<std::size_t>(rounded_up(features_, COLUMNS))),
        bias(weight.size()),
        features(features_),
        eps(eps_) {
    std::copy_n(from.weight, features, weight.data());
    std::copy_n(from.bias, features, bias.data());
  }

  void run(float* x) const {
    Floats sum{};
    for (std::int64_t c = 0; c < features; c += WIDTH) sum += load(x + c);
    const float mean = sum_of(sum) / static_cast<float>(features);
    Floats squares{};
    for (std::int64_t c = 0; c < features; c += WIDTH) {
      Floats d = load(x + c) - mean;
      if (c + WIDTH > features) d = only(d, features - c);
      squares = multiply_add(d, d, squares);
    }
    const float rstd = 1 / std::sqrt(sum_of(squares) / static_cast<float>(features) + eps);
    for (std::int64_t c = 0; c < features; c += WIDTH)
      store(x + c, multiply_add((load(x + c) - mean) * rstd, load(weight.data() + c), load(bias.data() + c)));
  }
};

// P: of the matrix products. A: of the attention's.
template <class P, class A>
class EncoderOf final : public Encoder {
 public:
  explicit EncoderOf(const EncoderSizes& sizes) : sizes_(sizes) {}

  void add_layer(const LayerWeights& layer) override {
    const std::int64_t N = sizes_.hidden, context = sizes_.heads * sizes_.head_dim;
    layers_.push_back(Layer{Weights<P>({layer.query, layer.key, layer.value}, context, N),
                            Weights<P>({layer.attention_out}, N, context),
                            Weights<P>({layer.inner}, sizes_.inner, N), Weights<P>({layer.out}, N, sizes_.inner),
                            Norm(layer.attention_norm, N, sizes_.eps), Norm(layer.norm, N, sizes_.eps)});
  }

  void run(const EncoderCall& call, const std::vector<int>& order) override {
    for (const int layer : order)
      if (layer < 0 || layer >= static_cast<int>(layers_.size())) throw std::invalid_argument("no such layer");
    const std::vector<Share> shares = shares_of(call);
    const auto count = static_cast<std::int64_t>(shares.size());
    if (call.threads > 1 && count < call.threads) {
      for (const Share& share : shares) run_together(call, order, share);
      return;
    }
    parallel_for(count, call.threads, [&](std::int64_t i) {
      Team alone(1);
      const Borrowed space(*this);
      run_share(call, order, shares[static_cast<std::size_t>(i)], *space, Member{alone, 0});
    });
  }

 private:
  struct Layer {
    Weights<P> query_key_value, attention_out, inner, out;
    Norm attention_norm, norm;
  };

  // Sequences that go through all layers together.
  struct Share {
    std::int64_t first, last;
  };

  struct Space {
    Buffer<float> hidden, query_key_value, inner;
    Buffer<char> rows, inner_rows;
    std::vector<RowScale> scales;
    std::vector<AttentionSpace> attention;
  };

  // Memory for a share, taken from what earlier calls left.
  class Borrowed {
   public:
    explicit Borrowed(EncoderOf& of) : of_(of) {
      const std::lock_guard<std::mutex> lock(of_.mutex_);
      if (!of_.spaces_.empty()) {
        space_ = std::move(of_.spaces_.back());
        of_.spaces_.pop_back();
      } else {
        space_ = std::make_unique<Space>();
      }
    }
    Borrowed(const Borrowed&) = delete;
    Borrowed& operator=(const Borrowed&) = delete;
    ~Borrowed() {
      const std::lock_guard<std::mutex> lock(of_.mutex_);
      of_.spaces_.push_back(std::move(space_));
    }
    Space& operator*() const { return *space_; }

   private:
    EncoderOf& of_;
    std::unique_ptr<Space> space_;
  };

  // Neighbouring sequences with about as many tokens as each other, not too few to read weights for nor so many that
  // they leave the cache.
  std::vector<Share> shares_of(const EncoderCall& call) const {
    const std::int64_t tokens = call.cu_seqlens[call.sequences];
    const std::int64_t most = std::clamp<std::int64_t>((tokens + call.threads - 1) / call.threads, 32, AT_ONCE);
    std::vector<Share> shares;
    std::int64_t first = 0;
    for (std::int64_t s = 1; s <= call.sequences; ++s) {
      if (s < call.sequences && call.cu_seqlens[s + 1] - call.cu_seqlens[first] <= most) continue;
      shares.push_back({first, s});
      first = s;
    }
    return shares;
  }

  void run_together(const EncoderCall& call, const std::vector<int>& order, const Share& share) {
    const Borrowed space(*this);
    (*space).attention.resize(static_cast<std::size_t>(call.threads));
    reserve(*space, call.cu_seqlens[share.last] - call.cu_seqlens[share.first]);
    std::int64_t longest = 0;
    for (std::int64_t s = share.first; s < share.last; ++s)
      longest = std::max<std::int64_t>(longest, call.cu_seqlens[s + 1] - call.cu_seqlens[s]);
    for (AttentionSpace& own : (*space).attention) Attention<A>(sizes_.head_dim, sizes_.scale, own).reserve(longest);
    Team team(call.threads), alone(1);
    if (!all_at_once(call.threads, [&](int rank) { run_share(call, order, share, *space, Member{team, rank}); }))
      run_share(call, order, share, *space, Member{alone, 0});
  }

  void reserve(Space& space, std::int64_t rows) const {
    const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
    const std::int64_t chunk = std::min(rows, CHUNK) + ROWS, context = sizes_.heads * sizes_.head_dim;
    space.hidden.reserve(size(rows * hidden_step()));
    space.query_key_value.reserve(size(rows * qkv_step()));
    space.rows.reserve(size(chunk * std::max(lines_of<P>(sizes_.hidden), lines_of<P>(context)) * LINE));
    space.inner_rows.reserve(size(chunk * lines_of<P>(sizes_.inner) * LINE));
    if (P::SCALED) space.inner.reserve(size(chunk * rounded_up(sizes_.inner, COLUMNS)));
    if (space.scales.size() < size(chunk)) space.scales.resize(size(chunk));
    if (space.attention.empty()) space.attention.resize(1);
  }

  std::int64_t hidden_step() const { return rounded_up(sizes_.hidden, COLUMNS); }
  std::int64_t qkv_step() const { return rounded_up(3 * sizes_.heads * sizes_.head_dim, COLUMNS); }

  void run_share(const EncoderCall& call, const std::vector<int>& order, const Share& share, Space& space,
                 const Member& member) const {
    const std::int64_t N = sizes_.hidden, step = hidden_step(), first_token = call.cu_seqlens[share.first];
    std::int64_t rows = call.cu_seqlens[share.last] - first_token;
    if (member.team.size() == 1) reserve(space, rows);
    float* hidden = space.hidden.data();
    for (std::int64_t r = member.begin(rows); r < member.end(rows); ++r) {
      std::copy_n(call.hidden + (first_token + r) * N, N, hidden + r * step);
      std::fill(hidden + r * step + N, hidden + (r + 1) * step, 0.0f);
    }
    member.wait();
    for (std::size_t i = 0; i < order.size(); ++i) {
      const Layer& layer = layers_[static_cast<std::size_t>(order[i])];
      query_key_value(layer, space, rows, member);
      attend(call, share, space, member);
      if (call.first_only && i + 1 == order.size()) rows = keep_first(call, share, space, member);
      feed_forward(layer, space, rows, member);
    }
    if (!call.first_only) {
      for (std::int64_t r = member.begin(rows); r < member.end(rows); ++r)
        std::copy_n(hidden + r * step, N, call.out + (first_token + r) * N);
    } else if (member.rank == 0) {
      std::int64_t r = 0;
      for (std::int64_t s = share.first; s < share.last; ++s) {
        float* out = call.out + s * N;
        if (call.cu_seqlens[s + 1] == call.cu_seqlens[s])
          std::fill_n(out, N, 0.0f);
        else
          std::copy_n(hidden + (order.empty() ? call.cu_seqlens[s] - first_token : r++) * step, N, out);
      }
    }
  }

  // The layer's input, in the order of products, for rows [begin, end) of a chunk.
  template <class RowOf>
  static void put_rows(Space& space, const Tiles& tiles, std::int64_t columns, const Member& member, const RowOf& row_of) {
    for (std::int64_t r = member.begin(tiles.rows); r < member.end(tiles.rows); ++r)
      space.scales[static_cast<std::size_t>(r)] =
          put_row<P>(space.rows.data() + tiles.row(r), tiles.step(), row_of(r), columns, tiles.lines);
    member.wait();
  }

  void query_key_value(const Layer& layer, Space& space, std::int64_t rows, const Member& member) const {
    const std::int64_t step = hidden_step(), to = qkv_step();
    for (std::int64_t start = 0; start < rows; start += CHUNK) {
      const Tiles tiles(std::min(CHUNK, rows - start), layer.query_key_value.lines());
      const float* hidden = space.hidden.data() + start * step;
      float* out = space.query_key_value.data() + start * to;
      put_rows(space, tiles, sizes_.hidden, member, [&](std::int64_t r) { return hidden + r * step; });
      product<P>(space.rows.data(), space.scales.data(), tiles, layer.query_key_value, member,
                 [&](const Place& place, std::int64_t column, Floats y0, Floats y1) {
                   store(out + place.row * to + column, y0);
                   store(out + place.row * to + column + WIDTH, y1);
                 });
      member.wait();
    }
  }

  void attend(const EncoderCall& call, const Share& share, Space& space, const Member& member) const {
    const std::int64_t D = sizes_.head_dim, context = sizes_.heads * D, step = qkv_step();
    const std::int64_t units = (share.last - share.first) * sizes_.heads;
    Attention<A> attention(D, sizes_.scale, space.attention[static_cast<std::size_t>(member.rank)]);
    for (std::int64_t u = member.begin(units); u < member.end(units); ++u) {
      const std::int64_t s = share.first + u / sizes_.heads, head = u % sizes_.heads;
      const std::int64_t row = call.cu_seqlens[s] - call.cu_seqlens[share.first];
      float* q = space.query_key_value.data() + row * step + head * D;
      attention.run(q, q + context, q + 2 * context, step, call.cu_seqlens[s + 1] - call.cu_seqlens[s]);
    }
    member.wait();
  }

  // Only the first token of each sequence goes on. Returns how many there are.
  std::int64_t keep_first(const EncoderCall& call, const Share& share, Space& space, const Member& member) const {
    std::int64_t kept = 0;
    for (std::int64_t s = share.first; s < share.last; ++s) {
      if (call.cu_seqlens[s + 1] == call.cu_seqlens[s]) continue;
      const std::int64_t row = call.cu_seqlens[s] - call.cu_seqlens[share.first];
      if (member.rank == 0 && row != kept) {
        std::copy_n(space.hidden.data() + row * hidden_step(), hidden_step(), space.hidden.data() + kept * hidden_step());
        std::copy_n(space.query_key_value.data() + row * qkv_step(), qkv_step(),
                    space.query_key_value.data() + kept * qkv_step());
      }
      ++kept;
    }
    member.wait();
    return kept;
  }

  // All behind the attention, whose context lies in the query's place.
  void feed_forward(const Layer& layer, Space& space, std::int64_t rows, const Member& member) const {
    const std::int64_t step = hidden_step(), context = sizes_.heads * sizes_.head_dim;
    for (std::int64_t start = 0; start < rows; start += CHUNK) {
      const std::int64_t count = std::min(CHUNK, rows - start);
      float* hidden = space.hidden.data() + start * step;
      const float* contexts = space.query_key_value.data() + start * qkv_step();
      const auto add = [&](const Place& place, std::int64_t column, Floats y0, Floats y1) {
        float* x = hidden + place.row * step + column;
        store(x, load(x) + y0);
        store(x + WIDTH, load(x + WIDTH) + y1);
      };

      const Tiles of_context(count, layer.attention_out.lines());
      put_rows(space, of_context, context, member, [&](std::int64_t r) { return contexts + r * qkv_step(); });
      product<P>(space.rows.data(), space.scales.data(), of_context, layer.attention_out, member, add);
      member.wait();

      const Tiles of_hidden(count, layer.inner.lines()), of_inner(count, layer.out.lines());
      put_rows(space, of_hidden, sizes_.hidden, member, [&](std::int64_t r) {
        layer.attention_norm.run(hidden + r * step);
        return hidden + r * step;
      });
      inner(layer, space, of_hidden, of_inner, member);
      product<P>(space.inner_rows.data(), space.scales.data(), of_inner, layer.out, member, add);
      member.wait();
      for (std::int64_t r = member.begin(count); r < member.end(count); ++r) layer.norm.run(hidden + r * step);
      member.wait();
    }
  }

  void inner(const Layer& layer, Space& space, const Tiles& of_hidden, const Tiles& of_inner, const Member& member) const {
    if constexpr (P::SCALED) {
      const std::int64_t step = rounded_up(sizes_.inner, COLUMNS);
      float* wide = space.inner.data();
      activated(layer, space, of_hidden, member, [&](const Place& place, std::int64_t column, Floats y0, Floats y1) {
        store(wide + place.row * step + column, y0);
        store(wide + place.row * step + column + WIDTH, y1);
      });
      for (std::int64_t r = member.begin(of_inner.rows); r < member.end(of_inner.rows); ++r)
        space.scales[static_cast<std::size_t>(r)] = put_row<P>(space.inner_rows.data() + of_inner.row(r), of_inner.step(),
                                                               wide + r * step, sizes_.inner, of_inner.lines);
      member.wait();
    } else {
      char* rows = space.inner_rows.data();
      activated(layer, space, of_hidden, member, [&](const Place& place, std::int64_t column, Floats y0, Floats y1) {
        P::put(rows + of_inner.tile(place.tile) + place.of_tile * LINE, of_inner.step(), column, y0, y1);
      });
    }
  }

  template <class Gelu, class Done>
  void activated_by(const Layer& layer, Space& space, const Tiles& tiles, const Member& member, const Done& done) const {
    product<P>(space.rows.data(), space.scales.data(), tiles, layer.inner, member,
               [&](const Place& place, std::int64_t column, Floats y0, Floats y1) {
                 done(place, column, Gelu::of(y0), Gelu::of(y1));
               });
  }

  template <class Done>
  void activated(const Layer& layer, Space& space, const Tiles& tiles, const Member& member, const Done& done) const {
    if (sizes_.tanh_gelu)
      activated_by<GeluTanh>(layer, space, tiles, member, done);
    else if constexpr (P::ROUNDED)
      activated_by<GeluErfRounded>(layer, space, tiles, member, done);
    else
      activated_by<GeluErf>(layer, space, tiles, member, done);
    member.wait();
  }

  static constexpr std::int64_t AT_ONCE = 192, CHUNK = 96;
  EncoderSizes sizes_;
  std::vector<Layer> layers_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Space>> spaces_;
};
