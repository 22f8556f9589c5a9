// What differs between instruction sets: AVX2. Included in front of simd.h.

typedef float Floats __attribute__((vector_size(32)));
#define FASTBERT_INLINE static inline __attribute__((always_inline))

FASTBERT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

// a0 b0 a1 b1 ..., and the rest of it.
FASTBERT_INLINE void interleave(Floats a, Floats b, Floats& low, Floats& high) {
  const __m256 of_low = _mm256_unpacklo_ps((__m256)a, (__m256)b), of_high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (Floats)_mm256_permute2f128_ps(of_low, of_high, 0x20);
  high = (Floats)_mm256_permute2f128_ps(of_low, of_high, 0x31);
}
