// Vectors of floats, and what is computed on them. Included once for each instruction set, inside of a namespace and of
// a region of functions that are compiled for it; WIDTH floats make a vector.

constexpr int WIDTH = FASTBERT_WIDTH;
typedef std::int32_t Ints __attribute__((vector_size(4 * FASTBERT_WIDTH)));

FASTBERT_INLINE Floats load(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

FASTBERT_INLINE void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof(x)); }

FASTBERT_INLINE Floats all(float x) { return Floats{} + x; }

FASTBERT_INLINE Ints bits_of(Floats x) {
  Ints bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  return bits;
}

FASTBERT_INLINE Floats of_bits(Ints bits) {
  Floats x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

FASTBERT_INLINE Ints lanes() {
  Ints lane;
  for (int i = 0; i < WIDTH; ++i) lane[i] = i;
  return lane;
}

// The first `count` lanes of x, zeros in the others.
FASTBERT_INLINE Floats only(Floats x, std::int64_t count) {
  return of_bits(bits_of(x) & (lanes() < Ints{} + static_cast<std::int32_t>(count)));
}

// The first `count` of these, at most a vector, and zeros.
FASTBERT_INLINE Floats load_some(const float* from, std::int64_t count) {
  if (count >= WIDTH) return load(from);
  float some[WIDTH] = {};
  for (std::int64_t i = 0; i < count; ++i) some[i] = from[i];
  return load(some);
}

FASTBERT_INLINE void store_some(float* to, Floats x, std::int64_t count) {
  if (count >= WIDTH) return store(to, x);
  float some[WIDTH];
  store(some, x);
  for (std::int64_t i = 0; i < count; ++i) to[i] = some[i];
}

// As many bfloat16 numbers.
FASTBERT_INLINE Floats load_bf16(const std::uint16_t* from) {
  std::uint16_t halves __attribute__((vector_size(2 * FASTBERT_WIDTH)));
  __builtin_memcpy(&halves, from, sizeof(halves));
  return of_bits(__builtin_convertvector(halves, Ints) << 16);
}

FASTBERT_INLINE Floats load_some_bf16(const std::uint16_t* from, std::int64_t count) {
  if (count >= WIDTH) return load_bf16(from);
  std::uint16_t some[WIDTH] = {};
  for (std::int64_t i = 0; i < count; ++i) some[i] = from[i];
  return load_bf16(some);
}

FASTBERT_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
FASTBERT_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

FASTBERT_INLINE float sum_of(Floats x) {
  float lane[WIDTH];
  store(lane, x);
  for (int half = WIDTH / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

FASTBERT_INLINE float largest_of(Floats x) {
  float lane[WIDTH];
  store(lane, x);
  for (int half = WIDTH / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// c[0] + c[1] x + ... by Horner's rule.
template <int N>
FASTBERT_INLINE Floats polynomial(Floats x, const float (&c)[N]) {
  Floats y = all(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) y = multiply_add(y, x, all(c[i]));
  return y;
}

// 2^x for x <= 126; 0 below -126. A minimax polynomial of degree 6 on [-1/2, 1/2]: relative error 2e-9 before rounding.
FASTBERT_INLINE Floats exp2_of(Floats x) {
  constexpr float C[] = {1.0f,           0.693147206f,   0.240226469f,  0.0555032878f,
                         0.00961848899f, 0.00133999311f, 0.000153458021f};
  constexpr float ROUND = 12582912.0f;  // 1.5 x 2^23: what is added to it is rounded to an integer
  const Ints is_zero = x < all(-126.0f);
  const Floats shifted = x + ROUND, whole = shifted - ROUND;
  const Floats y = polynomial(x - whole, C);
  const Ints power = (bits_of(shifted) - bits_of(all(ROUND))) << 23;
  return of_bits((bits_of(y) + power) & ~is_zero);
}

// x Phi(x), by the error function as a rational one, of minimax error 2e-8, 4e-7 with rounding.
struct GeluErf {
  FASTBERT_INLINE Floats of(Floats x) {
    constexpr float P[] = {1.128379146f,    0.1903952478f,     0.05274731197f,
                           0.003765162300f, 0.0002848765262f, 2.050218389e-6f};
    constexpr float Q[] = {1.0f, 0.5020661376f, 0.1141045407f, 0.01496829512f, 0.001162433411f, 3.809277113e-5f};
    const Floats z = smaller(larger(x * 0.707106781f, all(-3.92f)), all(3.92f)), t = z * z;
    const Floats erf = z * polynomial(t, P) / polynomial(t, Q), half = x * 0.5f;
    return multiply_add(half, erf, half);
  }
};

// The same for products that are rounded to 16 bits or less: Phi as a polynomial, absolute error of x Phi(x) below 8e-5.
struct GeluErfRounded {
  FASTBERT_INLINE Floats of(Floats x) {
    constexpr float C[] = {0.3988347060f,     -0.06622219835f,   0.009741009678f,    -0.001086477858f, 8.983887013e-5f,
                           -5.289835882e-6f, 2.072623924e-7f, -4.796095559e-9f, 4.924350416e-11f};
    const Floats z = smaller(larger(x, all(-4.2f)), all(4.2f));
    const Floats bounded = x < all(-4.2f) ? all(-4.2f) : x;  // a NaN stays
    return bounded * multiply_add(z, polynomial(z * z, C), all(0.5f));
  }
};

// x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form.
struct GeluTanh {
  FASTBERT_INLINE Floats of(Floats x) {
    constexpr float LOG2E = 1.44269504f;
    const Floats u = x * multiply_add(x * x, all(0.0356774081f), all(0.797884561f));
    const Floats power = smaller(u * (-2.0f * LOG2E), all(126.0f));
    return x / (exp2_of(power) + 1.0f);
  }
};
