// BERT's layers for inference. Included once for each instruction set, behind norm.h and attention_of_head.h.

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

  void set_norm(const NormWeights& norm, float eps) override { norm_.emplace(norm, sizes_.hidden, eps); }

  void run(const EncoderCall& call, const std::vector<int>& order) override {
    for (const int layer : order)
      if (layer < 0 || layer >= static_cast<int>(layers_.size())) throw std::invalid_argument("no such layer");
    if (call.embeddings != nullptr) check_ids(*call.embeddings, call.cu_seqlens[call.sequences]);
    const Begin begin(call, sizes_.hidden);
    const Shares shares = shares_of(call.cu_seqlens, call.sequences, call.threads);
    torch_parallel_for(shares.alone, call.threads, [&](std::int64_t i) {
      Team alone(1);
      const Borrowed space(*this);
      run_share(call, begin, order, shares.all[static_cast<std::size_t>(i)], *space, Member{alone, 0});
    });
    for (auto i = static_cast<std::size_t>(shares.alone); i < shares.all.size(); ++i)
      run_together(call, begin, order, shares.all[i]);
  }

 private:
  struct Layer {
    Weights<P> query_key_value, attention_out, inner, out;
    Norm attention_norm, norm;
  };

  // What goes into the first layer.
  class Begin {
   public:
    Begin(const EncoderCall& call, std::int64_t features) : call_(call), features_(features) {
      if (call.embeddings != nullptr && call.embeddings->norm.weight != nullptr)
        norm_.emplace(call.embeddings->norm, features, call.embeddings->eps);
    }
    void put(std::int64_t token, float* to, std::int64_t step) const {
      if (call_.embeddings == nullptr) {
        std::copy_n(call_.hidden + token * features_, features_, to);
        std::fill(to + features_, to + step, 0.0f);
        return;
      }
      std::fill(to + features_ / WIDTH * WIDTH, to + step, 0.0f);
      embed(*call_.embeddings, token, features_, to);
      if (norm_) norm_->run(to, to);
    }

   private:
    const EncoderCall& call_;
    std::int64_t features_;
    std::optional<Norm> norm_;
  };

  struct Space {
    Buffer<float> hidden, query_key_value, inner, normalised;
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

  void run_together(const EncoderCall& call, const Begin& begin, const std::vector<int>& order, const Share& share) {
    const Borrowed space(*this);
    (*space).attention.resize(static_cast<std::size_t>(call.threads));
    reserve(*space, call.cu_seqlens[share.last] - call.cu_seqlens[share.first]);
    std::int64_t longest = 0;
    for (std::int64_t s = share.first; s < share.last; ++s)
      longest = std::max<std::int64_t>(longest, call.cu_seqlens[s + 1] - call.cu_seqlens[s]);
    for (AttentionSpace& own : (*space).attention) Attention<A>(sizes_.head_dim, sizes_.scale, own).reserve(longest);
    Team team(call.threads), alone(1);
    if (!all_torch_threads_at_once(call.threads, [&](int rank) { run_share(call, begin, order, share, *space, Member{team, rank}); }))
      run_share(call, begin, order, share, *space, Member{alone, 0});
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
    if (sizes_.norm_first) space.normalised.reserve(space.attention.size() * size(hidden_step()));
  }

  std::int64_t hidden_step() const { return rounded_up(sizes_.hidden, COLUMNS); }
  std::int64_t qkv_step() const { return rounded_up(3 * sizes_.heads * sizes_.head_dim, COLUMNS); }

  void run_share(const EncoderCall& call, const Begin& begin, const std::vector<int>& order, const Share& share,
                 Space& space, const Member& member) const {
    const std::int64_t N = sizes_.hidden, step = hidden_step(), first_token = call.cu_seqlens[share.first];
    std::int64_t rows = call.cu_seqlens[share.last] - first_token;
    if (member.team.size() == 1) reserve(space, rows);
    float* hidden = space.hidden.data();
    for (std::int64_t r = member.begin(rows); r < member.end(rows); ++r)
      begin.put(first_token + r, hidden + r * step, step);
    member.wait();
    for (std::size_t i = 0; i < order.size(); ++i) {
      const Layer& layer = layers_[static_cast<std::size_t>(order[i])];
      query_key_value(layer, space, rows, member);
      attend(call, share, space, member);
      if (call.first_only && i + 1 == order.size()) rows = keep_first(call, share, space, member);
      feed_forward(layer, space, rows, member);
    }
    if (norm_) {
      for (std::int64_t r = member.begin(rows); r < member.end(rows); ++r) norm_->run(hidden + r * step, hidden + r * step);
      member.wait();
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

  // What goes into a half of a layer that normalises first; overwritten by the next.
  const float* normalised(const Norm& norm, const float* x, Space& space, const Member& member) const {
    float* to = space.normalised.data() + member.rank * hidden_step();
    norm.run(x, to);
    return to;
  }

  void query_key_value(const Layer& layer, Space& space, std::int64_t rows, const Member& member) const {
    const std::int64_t step = hidden_step(), to = qkv_step();
    for (std::int64_t start = 0; start < rows; start += CHUNK) {
      const Tiles tiles(std::min(CHUNK, rows - start), layer.query_key_value.lines());
      const float* hidden = space.hidden.data() + start * step;
      float* out = space.query_key_value.data() + start * to;
      put_rows(space, tiles, sizes_.hidden, member, [&](std::int64_t r) {
        const float* x = hidden + r * step;
        return sizes_.norm_first ? normalised(layer.attention_norm, x, space, member) : x;
      });
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
        float* x = hidden + r * step;
        if (sizes_.norm_first) return normalised(layer.norm, x, space, member);
        layer.attention_norm.run(x, x);
        return static_cast<const float*>(x);
      });
      inner(layer, space, of_hidden, of_inner, member);
      product<P>(space.inner_rows.data(), space.scales.data(), of_inner, layer.out, member, add);
      member.wait();
      if (sizes_.norm_first) continue;
      for (std::int64_t r = member.begin(count); r < member.end(count); ++r)
        layer.norm.run(hidden + r * step, hidden + r * step);
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

  static constexpr std::int64_t CHUNK = 96;
  EncoderSizes sizes_;
  std::vector<Layer> layers_;
  std::optional<Norm> norm_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Space>> spaces_;
};
