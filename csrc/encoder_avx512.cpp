// float32 with AVX-512.
#include "instruction_sets.h"

#if FASTBERT_X86

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "encoder.h"
#include "parallel.h"
#include "philox.h"
#include "shares.h"
#include "team.h"

#define FASTBERT_WIDTH 16
#define FASTBERT_ROWS 14
#define FASTBERT_BF16 0
#define FASTBERT_VNNI 0

// GCC's own intrinsics begin with an undefined vector.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
FASTBERT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
namespace fastbert::avx512 {
#include "simd_avx512.h"
#include "simd.h"
#include "products.h"
#include "norm.h"
#include "attention_of_head.h"
#include "attention_of_training.h"
#include "encoder_layers.h"

std::unique_ptr<Encoder> make_fp32(const EncoderSizes& sizes) { return std::make_unique<EncoderOf<Float32, Float32>>(sizes); }

void attention(const AttentionCall& call, Heads<float> o, float* lse) { attend(call, o, lse); }
void attention_backward(const AttentionCall& call, Heads<const float> grad, Heads<const float> o, const float* lse,
                        Heads<float> dq, Heads<float> dk, Heads<float> dv) {
  attend_backward(call, grad, o, lse, dq, dk, dv);
}
}  // namespace fastbert::avx512
FASTBERT_TARGET_END

#endif
