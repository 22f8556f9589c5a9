// LayerNorm, and the sum of embeddings. Included once for each instruction set, behind simd.h and products.h.

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

  // to: may be x.
  void run(const float* x, float* to) const {
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
      store(to + c, multiply_add((load(x + c) - mean) * rstd, load(weight.data() + c), load(bias.data() + c)));
  }
};

// The sum of a token's rows of all tables; zeros beyond the last feature.
FASTBERT_INLINE void embed(const Embeddings& embeddings, std::int64_t token, std::int64_t features, float* to) {
  bool first = true;
  for (const Embeddings::Part& part : embeddings.parts) {
    const std::int64_t at = part.ids[token] * part.table.step;
    for (std::int64_t c = 0; c < features; c += WIDTH) {
      const Floats x = part.table.is_bf16
                           ? load_some_bf16(static_cast<const std::uint16_t*>(part.table.rows) + at + c, features - c)
                           : load_some(static_cast<const float*>(part.table.rows) + at + c, features - c);
      store(to + c, first ? x : load(to + c) + x);
    }
    first = false;
  }
}
