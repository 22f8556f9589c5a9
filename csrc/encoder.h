#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fastbert {

// What products are computed in: float32; bfloat16, or 8-bit integers, with float32 sums and everything else in float32.
enum class Precision { fp32, bf16, int8 };

// hidden = N features, heads x head_dim of attention, inner features of the feed-forward.
struct EncoderSizes {
  std::int64_t hidden = 0, heads = 0, head_dim = 0, inner = 0;
  float eps = 0, scale = 0;  // of LayerNorm; of attention's scores
  bool tanh_gelu = false;
  bool norm_first = false;  // LayerNorm of what goes into attention and feed-forward, not of the sums behind them
};

// A matrix product's: weight is (rows, cols) as in torch.nn.Linear, bias has rows elements or is null.
struct LinearWeights {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct NormWeights {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

// attention_norm is the attention's, norm the feed-forward's: behind their sums, or with norm_first in front of them.
struct LayerWeights {
  LinearWeights query, key, value, attention_out;
  NormWeights attention_norm;
  LinearWeights inner, out;
  NormWeights norm;
};

// Rows of an embedding table, float32 or bfloat16, read where they lie: from one to the next `step` elements.
struct Table {
  const void* rows = nullptr;
  bool is_bf16 = false;
  std::int64_t count = 0, step = 0;
};

// What stands in front of the layers: LayerNorm of the sum of a row of each table; without weights, the sum.
// ids: of each table a row for each token.
struct Embeddings {
  struct Part {
    Table table;
    const std::int64_t* ids = nullptr;
  };
  std::vector<Part> parts;
  NormWeights norm;
  float eps = 0;
};

// Packed tokens on their way through the layers, cu_seqlens has sequences + 1 elements.
// embeddings, or hidden: (tokens, N). out: (tokens, N), or with first_only (sequences, N), of each sequence's first token;
// zeros for an empty sequence.
struct EncoderCall {
  const Embeddings* embeddings = nullptr;
  const float* hidden = nullptr;
  const std::int32_t* cu_seqlens = nullptr;
  std::int64_t sequences = 0;
  bool first_only = false;
  float* out = nullptr;
  int threads = 1;
};

// BERT's layers for inference, over weights that were put in the order in which they are read. Any number of threads may
// call it at a time.
class Encoder {
 public:
  Encoder() = default;
  Encoder(const Encoder&) = delete;
  Encoder& operator=(const Encoder&) = delete;
  virtual ~Encoder() = default;

  // Copies the weights of one more layer.
  virtual void add_layer(const LayerWeights& layer) = 0;

  // Copies the weights of a LayerNorm behind the last layer.
  virtual void set_norm(const NormWeights& norm, float eps) = 0;

  // order: which layer runs when; one may run several times. Throws std::invalid_argument if one is not there, and
  // std::out_of_range if an id is not in its table.
  virtual void run(const EncoderCall& call, const std::vector<int>& order) = 0;
};

// Throws std::out_of_range if an id is not in its table.
void check_ids(const Embeddings& embeddings, std::int64_t tokens);

// Whether this CPU has instructions for it.
bool can_encode(Precision precision);

// Throws std::invalid_argument if can_encode is false or sizes are not positive.
std::unique_ptr<Encoder> make_encoder(Precision precision, const EncoderSizes& sizes);

}  // namespace fastbert
