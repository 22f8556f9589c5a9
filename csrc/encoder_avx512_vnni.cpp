// 8-bit integers with AVX-512 VNNI, attention in float32: Cascade Lake, Ice Lake.
#include "instruction_sets.h"

#if FASTBERT_X86

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>

#include "buffer.h"
#include "encoder.h"
#include "parallel.h"
#include "shares.h"
#include "team.h"

#define FASTBERT_WIDTH 16
#define FASTBERT_ROWS 14
#define FASTBERT_BF16 0
#define FASTBERT_VNNI 1

// GCC's own intrinsics begin with an undefined vector.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
FASTBERT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace fastbert::avx512_vnni {
#include "simd_avx512.h"
#include "simd.h"
#include "products.h"
#include "norm.h"
#include "attention_of_head.h"
#include "encoder_layers.h"

std::unique_ptr<Encoder> make_int8(const EncoderSizes& sizes) { return std::make_unique<EncoderOf<Int8, Float32>>(sizes); }
}  // namespace fastbert::avx512_vnni
FASTBERT_TARGET_END

#endif
