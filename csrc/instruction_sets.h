#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTBERT_X86 1
#else
#define FASTBERT_X86 0
#endif

// Functions between these two are compiled for instructions that not every CPU has. Headers of the standard library must
// be included before: what they define inline may be called from anywhere.
#define FASTBERT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTBERT_TARGET_BEGIN(names) \
  FASTBERT_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define FASTBERT_TARGET_END FASTBERT_PRAGMA(clang attribute pop)
#else
#define FASTBERT_TARGET_BEGIN(names) FASTBERT_PRAGMA(GCC push_options) FASTBERT_PRAGMA(GCC target(names))
#define FASTBERT_TARGET_END FASTBERT_PRAGMA(GCC pop_options)
#endif

#if FASTBERT_X86
namespace fastbert {

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

}  // namespace fastbert
#endif
