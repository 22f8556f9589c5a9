#pragma once

#include <cstdint>

namespace fastbert {

// Rows of (T, H, D) float32, features side by side: element (t, h, d) is data[t * step + h * head_step + d].
template <typename T>
struct Heads {
  T* data;
  std::int64_t step, head_step;

  T* row(std::int64_t token, std::int64_t head) const { return data + token * step + head * head_step; }
};

// Attention over packed sequences, with dropout of its probabilities, for training on a CPU.
// The specification is fastbert.reference.attention and attention_backward.
struct AttentionCall {
  Heads<const float> q, k, v;
  std::int64_t heads, head_dim, tokens, sequences;
  const std::int32_t* cu_seqlens;  // (sequences + 1,), rises from 0 to tokens
  float scale;
  bool causal;
  std::uint32_t threshold;  // of philox.h's keep_mask; 0 for no dropout
  float keep_scale;
  std::uint64_t seed;
  std::uint32_t stream;
  int threads;
};

// Results do not depend on the number of threads, nor a sequence's on what else is in the batch.
// o: (T, H, D).  lse: (H, T).
void attention(const AttentionCall& call, Heads<float> o, float* lse);
void attention_backward(const AttentionCall& call, Heads<const float> grad, Heads<const float> o, const float* lse,
                        Heads<float> dq, Heads<float> dk, Heads<float> dv);

// Whether this CPU has the instructions.
bool can_attend();

// For one set of instructions each; of a CPU that has them.
namespace avx2 {
void attention(const AttentionCall& call, Heads<float> o, float* lse);
void attention_backward(const AttentionCall& call, Heads<const float> grad, Heads<const float> o, const float* lse,
                        Heads<float> dq, Heads<float> dk, Heads<float> dv);
}  // namespace avx2
namespace avx512 {
void attention(const AttentionCall& call, Heads<float> o, float* lse);
void attention_backward(const AttentionCall& call, Heads<const float> grad, Heads<const float> o, const float* lse,
                        Heads<float> dq, Heads<float> dk, Heads<float> dv);
}  // namespace avx512

}  // namespace fastbert
