#include "encoder.h"

#include <algorithm>
#include <stdexcept>

#include "instruction_sets.h"

namespace fastbert {

namespace avx2 {
std::unique_ptr<Encoder> make_fp32(const EncoderSizes& sizes);
}
namespace avx512 {
std::unique_ptr<Encoder> make_fp32(const EncoderSizes& sizes);
}
namespace avx512_vnni {
std::unique_ptr<Encoder> make_int8(const EncoderSizes& sizes);
}
namespace avx512_bf16 {
std::unique_ptr<Encoder> make_bf16(const EncoderSizes& sizes);
std::unique_ptr<Encoder> make_int8(const EncoderSizes& sizes);
}  // namespace avx512_bf16

namespace {

using Maker = std::unique_ptr<Encoder> (*)(const EncoderSizes&);

#if FASTBERT_X86
Maker maker_of(Precision precision) {
  const bool avx512 = has_avx512(), vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  switch (precision) {
    case Precision::fp32:
      if (avx512) return avx512::make_fp32;
      return has_avx2() ? avx2::make_fp32 : nullptr;
    case Precision::bf16:
      return bf16 ? avx512_bf16::make_bf16 : nullptr;
    case Precision::int8:
      if (bf16) return avx512_bf16::make_int8;
      return vnni ? avx512_vnni::make_int8 : nullptr;
  }
  return nullptr;
}
#else
Maker maker_of(Precision) { return nullptr; }
#endif

}  // namespace

void check_ids(const Embeddings& embeddings, std::int64_t tokens) {
  if (tokens == 0) return;
  for (const Embeddings::Part& part : embeddings.parts) {
    const auto [least, most] = std::minmax_element(part.ids, part.ids + tokens);
    if (*least < 0 || *most >= part.table.count)
      throw std::out_of_range("an id is " + std::to_string(*least < 0 ? *least : *most) + ", but the table has " +
                              std::to_string(part.table.count) + " rows");
  }
}

bool can_encode(Precision precision) { return maker_of(precision) != nullptr; }

std::unique_ptr<Encoder> make_encoder(Precision precision, const EncoderSizes& sizes) {
  const Maker maker = maker_of(precision);
  if (maker == nullptr) throw std::invalid_argument("this CPU lacks the instructions");
  if (sizes.hidden < 1 || sizes.heads < 1 || sizes.head_dim < 1 || sizes.inner < 1)
    throw std::invalid_argument("sizes must be positive");
  return maker(sizes);
}

}  // namespace fastbert
