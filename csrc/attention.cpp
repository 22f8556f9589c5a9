#include "attention.h"

#include <stdexcept>

#include "instruction_sets.h"

namespace fastbert {

namespace {

struct Attention {
  decltype(&avx2::attention) forward = nullptr;
  decltype(&avx2::attention_backward) backward = nullptr;
};

Attention best() {
#if FASTBERT_X86
  if (has_avx512()) return {avx512::attention, avx512::attention_backward};
  if (has_avx2()) return {avx2::attention, avx2::attention_backward};
#endif
  return {};
}

Attention checked() {
  const Attention found = best();
  if (found.forward == nullptr) throw std::invalid_argument("this CPU lacks the instructions");
  return found;
}

}  // namespace

bool can_attend() { return best().forward != nullptr; }

void attention(const AttentionCall& call, Heads<float> o, float* lse) { checked().forward(call, o, lse); }

void attention_backward(const AttentionCall& call, Heads<const float> grad, Heads<const float> o, const float* lse,
                        Heads<float> dq, Heads<float> dk, Heads<float> dv) {
  checked().backward(call, grad, o, lse, dq, dk, dv);
}

}  // namespace fastbert
