// What differs between instruction sets: AVX-512. Included in front of simd.h.

typedef float Floats __attribute__((vector_size(64)));
#define FASTBERT_INLINE static inline __attribute__((always_inline))

FASTBERT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// a0 b0 a1 b1 ..., and the rest of it.
FASTBERT_INLINE void interleave(Floats a, Floats b, Floats& low, Floats& high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  low = (Floats)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
  high = (Floats)_mm512_permutex2var_ps((__m512)a, second, (__m512)b);
}
