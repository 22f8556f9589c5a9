// Exercises the C++ core without Python, for the sanitizers: `make sanitize`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "attention.h"
#include "batches.h"
#include "corpus.h"
#include "encoder.h"
#include "instruction_sets.h"
#include "masking.h"
#include "packing.h"
#include "philox.h"
#include "sampling.h"
#include "shares.h"

namespace {

void check(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

void test_packing() {
  const std::vector<std::int64_t> lengths{3, 0, 2, 4};
  const std::int64_t tokens = fastbert::total_tokens(lengths.data(), 4, 4);
  check(tokens == 9, "total");
  std::vector<std::int64_t> indices(9), position_ids(9);
  std::vector<std::int32_t> cu_seqlens(5);
  fastbert::pack_lengths(lengths.data(), 4, 4, indices.data(), cu_seqlens.data(), position_ids.data());
  check(indices == std::vector<std::int64_t>{0, 1, 2, 8, 9, 12, 13, 14, 15}, "indices");
  check(position_ids == std::vector<std::int64_t>{0, 1, 2, 0, 1, 0, 1, 2, 3}, "position_ids");
  check(cu_seqlens == std::vector<std::int32_t>{0, 3, 3, 5, 9}, "cu_seqlens");
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{5}, std::int64_t{1} << 40}) {
    bool thrown = false;
    try {
      fastbert::total_tokens(&bad, 1, 4);
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    check(thrown, "a length out of range");
  }
}

// Every sequence is in one share, in order; threads end at about the same time.
void test_shares() {
  for (const int threads : {1, 2, 3, 8}) {
    for (std::uint64_t seed = 0; seed < 300; ++seed) {
      fastbert::Random random(fastbert::Random::Use::order, seed, 0, 0);
      const auto draw = [&](std::uint32_t n) { return static_cast<std::int32_t>(random.below(n)); };
      const std::int32_t sequences = draw(40);
      const std::uint32_t longest = seed % 3 == 0 ? 20 : 300;
      std::vector<std::int32_t> cu_seqlens{0};
      for (int s = 0; s < sequences; ++s) cu_seqlens.push_back(cu_seqlens.back() + (draw(5) == 0 ? 0 : draw(longest)));
      const fastbert::Shares shares = fastbert::shares_of(cu_seqlens.data(), sequences, threads);
      std::int64_t next = 0;
      for (const fastbert::Share& share : shares.all) {
        check(share.first == next && share.last > next, "a share begins where the last one ends");
        next = share.last;
      }
      check(next == sequences, "all sequences are in a share");
      check(0 <= shares.alone && shares.alone <= static_cast<std::int64_t>(shares.all.size()), "shares of one thread");
      std::vector<double> until(static_cast<std::size_t>(threads), 0);
      for (std::int64_t i = 0; i < shares.alone; ++i) {
        const fastbert::Share& share = shares.all[static_cast<std::size_t>(i)];
        *std::min_element(until.begin(), until.end()) += cu_seqlens[static_cast<std::size_t>(share.last)] -
                                                         cu_seqlens[static_cast<std::size_t>(share.first)];
      }
      const std::int32_t tokens = cu_seqlens.back();
      const auto done = static_cast<std::size_t>(shares.alone) == shares.all.size()
                            ? tokens
                            : cu_seqlens[static_cast<std::size_t>(shares.all[static_cast<std::size_t>(shares.alone)].first)];
      const double end = *std::max_element(until.begin(), until.end()) + (tokens - done) * 1.0 / threads;
      check(end <= 1.06 * tokens / threads + 1e-9, "threads end together");
    }
  }
  for (const std::int64_t repeated : {1, 10, 100}) {  // short ones: neither the cache's end nor the weights' reading counts
    std::vector<std::int32_t> cu_seqlens{0};
    for (std::int64_t s = 0; s < 10 * repeated; ++s) cu_seqlens.push_back(cu_seqlens.back() + 20);
    for (const fastbert::Share& share : fastbert::shares_of(cu_seqlens.data(), 10 * repeated, 2).all) {
      const std::int32_t tokens = cu_seqlens[static_cast<std::size_t>(share.last)] - cu_seqlens[static_cast<std::size_t>(share.first)];
      check(60 <= tokens && tokens <= 200, "a share's tokens");
    }
  }
}

void test_mask() {
  for (const std::int64_t cols : {0, 1, 15, 16, 17, 1023, 1024, 1025, 3000}) {
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(2 * 3 * cols) + 1, 7);
    fastbert::keep_mask(mask.data(), 2, 5, 3, cols, 26, 0x123456789abcdef0u, 4, cols % 2 == 1);
    check(mask.back() == 7, "nothing written past the end");
    mask.pop_back();
    for (const std::uint8_t kept : mask) check(kept <= 1, "a byte that is neither 0 nor 1");
  }
  const std::vector<std::int64_t> numbers{9, 6, 1, 5};
  std::vector<std::uint8_t> one(20), numbered(40);
  fastbert::keep_mask(numbered.data(), 1, 1, 2, 20, 128, 3, 2, false, numbers.data());
  fastbert::keep_mask(one.data(), 1, 6, 1, 20, 128, 3, 2, false);
  check(std::equal(one.begin(), one.end(), numbered.begin()), "row 1 counted as row 6");
  fastbert::keep_mask(one.data(), 1, 1, 1, 20, 128, 3, 2, false);
  check(std::equal(one.begin(), one.end(), numbered.begin() + 20), "row 2 counted as row 1");
  std::vector<std::uint8_t> none(64, 1);
  fastbert::keep_mask(none.data(), 1, 0, 2, 32, 256, 1, 0, false);
  check(none == std::vector<std::uint8_t>(64, 0), "threshold 256 keeps nothing");
}

template <typename Call>
void check_throws(const Call& call, const char* what) {
  bool thrown = false;
  try {
    call();
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  check(thrown, what);
}

constexpr std::int64_t kVocabulary = 50;

fastbert::Vocabulary vocabulary() {
  std::vector<std::uint8_t> kinds(kVocabulary, 0);
  for (std::size_t id = 0; id < 5; ++id) kinds[id] = fastbert::Vocabulary::kSpecial;
  for (std::size_t id = 40; id < kVocabulary; ++id) kinds[id] = fastbert::Vocabulary::kContinuation;
  return {kinds.data(), kVocabulary, 4};
}

// A part of documents with 1, 2, 3, ... sentences of 1, 2, 3, ... tokens.
struct Text {
  explicit Text(std::uint32_t count) {
    for (std::uint32_t document = 1; document <= count; ++document) {
      for (std::uint32_t sentence = 1; sentence <= document; ++sentence) {
        for (std::uint32_t i = 0; i < sentence; ++i) tokens.push_back(static_cast<std::uint16_t>(5 + (tokens.size() * 7) % 45));
        sentences.push_back(static_cast<std::uint32_t>(tokens.size()));
      }
      documents.push_back(static_cast<std::uint32_t>(sentences.size()) - 1);
    }
  }
  fastbert::Part part() const {
    return {tokens.data(), false, sentences.data(), documents.data(), static_cast<std::int64_t>(tokens.size()),
            static_cast<std::int64_t>(sentences.size()) - 1, static_cast<std::int64_t>(documents.size()) - 1};
  }
  std::vector<std::uint16_t> tokens;
  std::vector<std::uint32_t> sentences{0}, documents{0};
};

void test_masking() {
  const fastbert::Vocabulary known = vocabulary();
  using Unit = fastbert::Masking::Unit;
  for (const Unit unit : {Unit::token, Unit::word, Unit::span}) {
    for (const double rate : {0.0, 0.15, 1.0}) {
      for (const std::int64_t length : {0, 1, 2, 3, 17, 128}) {
        fastbert::Masking masking;
        masking.unit = unit;
        masking.rate = rate;
        masking.max_predictions = length % 2 == 1 ? 5 : 0;
        const std::int64_t cu_seqlens[] = {0, length, length, 3 * length};
        const auto tokens = static_cast<std::size_t>(3 * length);
        std::vector<std::int64_t> ids(tokens), corrupted(tokens + 1, -7), labels(tokens + 1, -7);
        for (std::size_t i = 0; i < tokens; ++i) ids[i] = static_cast<std::int64_t>((i * 13) % kVocabulary);
        const auto rows = fastbert::corrupt(known, masking, ids.data(), 3 * length, cu_seqlens, 3, 1, 2, 3, nullptr, 2,
                                            corrupted.data(), labels.data());
        check(corrupted.back() == -7 && labels.back() == -7, "nothing written past the end");
        check(std::is_sorted(rows.begin(), rows.end()), "rows rise");
        for (const std::int64_t row : rows) {
          check(labels[static_cast<std::size_t>(row)] == ids[static_cast<std::size_t>(row)], "a label is what was there");
        }
        check(rate > 0.0 || rows.empty(), "rate 0 chooses nothing");
      }
    }
  }
}

void test_sampling() {
  const Text long_text(30), short_text(2);
  const fastbert::Corpus corpus({short_text.part(), long_text.part(), short_text.part()}, 2);
  check(corpus.documents() == 34, "documents");
  check_throws([&] { fastbert::Corpus({[&] { auto part = long_text.part(); part.token_count -= 1; return part; }()}, 1); },
               "sentences that do not add up");
  const fastbert::Vocabulary known = vocabulary();
  using Form = fastbert::Sampling::Form;
  for (const Form form : {Form::pairs, Form::full_sentences}) {
    for (const std::int64_t max_length : {5, 6, 32, 400}) {
      fastbert::Sampling sampling;
      sampling.form = form;
      sampling.max_length = max_length;
      const fastbert::Plan plan = fastbert::plan(corpus, sampling, 3, 0, 4);
      check(plan.next_document == 34 && !plan.sequences.empty(), "one window holds it all");
      std::vector<std::int64_t> picks, lengths;
      std::int64_t tokens = 0;
      for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
        picks.push_back(static_cast<std::int64_t>(i));
        lengths.push_back(plan.sequences[i].length);
        tokens += lengths.back();
        check(lengths.back() <= max_length, "no sequence is too long");
      }
      const auto size = static_cast<std::size_t>(tokens);
      std::vector<std::int64_t> ids(size), types(size), positions(size), labels(size), next(picks.size());
      std::vector<std::int32_t> cu_seqlens(picks.size() + 1);
      const fastbert::Batch batch{ids.data(), types.data(), positions.data(), labels.data(), cu_seqlens.data(), next.data()};
      const auto rows =
          fastbert::write_batch(corpus, sampling, known, {2, 3}, {}, fastbert::Objective::masked, plan, picks.data(),
                                static_cast<std::int64_t>(picks.size()), 3, batch);
      check(!rows.empty() && rows.back() < tokens, "rows are in the batch");
      const auto groups = fastbert::group_into_batches(lengths.data(), static_cast<std::int64_t>(lengths.size()), 400,
                                                       fastbert::Grouping::packed, 1, 2, 3);
      check(groups.order.size() == lengths.size(), "everything is in some batch");
    }
  }
  check_throws([&] { fastbert::plan(corpus, {}, 0, 1, 1); }, "a window that does not start there");
}

// Numbers between -1/2 and 1/2.
std::vector<float> random_floats(std::int64_t count, std::uint32_t seed) {
  std::vector<float> numbers(static_cast<std::size_t>(count));
  for (float& number : numbers) {
    seed = seed * 1664525u + 1013904223u;
    number = static_cast<float>(seed >> 8) / static_cast<float>(1 << 24) - 0.5f;
  }
  return numbers;
}

void test_encoder(bool norm_first) {
  const std::int64_t N = 40, inner = 100;
  const std::vector<std::int32_t> cu_seqlens{0, 1, 1, 38, 238, 240, 305};
  const std::int64_t tokens = cu_seqlens.back(), sequences = 6;
  const std::vector<float> hidden = random_floats(tokens * N, 1), matrix = random_floats(inner * N, 2);
  const std::vector<float> bias = random_floats(inner, 3), ones(static_cast<std::size_t>(N), 1.0f);
  const fastbert::NormWeights norm{ones.data(), bias.data()};
  const fastbert::LinearWeights projection{matrix.data(), bias.data()}, without{matrix.data(), nullptr};
  const fastbert::LayerWeights layer{projection, projection, without, projection, norm, projection, projection, norm};
  for (const auto precision : {fastbert::Precision::fp32, fastbert::Precision::bf16, fastbert::Precision::int8}) {
    if (!fastbert::can_encode(precision)) continue;
    const auto encoder = fastbert::make_encoder(precision, {N, 3, 12, inner, 1e-12f, 0.3f, false, norm_first});
    encoder->add_layer(layer);
    if (norm_first) encoder->set_norm(norm, 1e-6f);
    const auto run = [&](bool first_only, int threads) {
      std::vector<float> out(static_cast<std::size_t>((first_only ? sequences : tokens) * N), -7.0f);
      encoder->run({nullptr, hidden.data(), cu_seqlens.data(), sequences, first_only, out.data(), threads}, {0, 0});
      return out;
    };
    const std::vector<float> expected = run(false, 1);
    for (const float x : expected) check(std::isfinite(x) && x != -7.0f, "every element is written");
    std::thread other([&] { check(run(false, 2) == expected, "the same on two threads"); });
    check(run(false, 20) == expected, "the same on many threads");
    other.join();
    const std::vector<float> first = run(true, 3);
    for (std::size_t s = 0; s < 6; ++s)
      for (std::size_t c = 0; c < static_cast<std::size_t>(N); ++c) {
        const std::size_t row = static_cast<std::size_t>(cu_seqlens[s]) * static_cast<std::size_t>(N);
        const bool empty = cu_seqlens[s] == cu_seqlens[s + 1];
        check(first[s * static_cast<std::size_t>(N) + c] == (empty ? 0 : expected[row + c]), "each first token");
      }
  }
}

void test_attention(std::int64_t head_dim, bool causal, std::uint32_t threshold) {
  if (!fastbert::can_attend()) return;
  const std::vector<std::int32_t> cu_seqlens{0, 1, 1, 38, 238, 240, 305};
  const std::int64_t tokens = cu_seqlens.back(), heads = 3, step = heads * head_dim;
  const std::vector<float> qkv = random_floats(tokens * 3 * step, 1), grad = random_floats(tokens * step, 2);
  const auto part = [&](std::int64_t i) { return fastbert::Heads<const float>{qkv.data() + i * step, 3 * step, head_dim}; };
  const auto run = [&](int threads) {
    const auto room = [](std::int64_t size) { return std::vector<float>(static_cast<std::size_t>(size), -7.0f); };
    std::vector<float> o = room(tokens * step), lse = room(tokens * heads), gradient = room(tokens * 3 * step);
    const fastbert::AttentionCall call{part(0),           part(1), part(2), heads,     head_dim, tokens, 6,
                                       cu_seqlens.data(), 0.3f,    causal,  threshold, 1.1f,     5,      7,
                                       threads};
    const fastbert::Heads<float> out{o.data(), step, head_dim};
    fastbert::attention(call, out, lse.data());
    const auto of = [&](std::int64_t i) { return fastbert::Heads<float>{gradient.data() + i * step, 3 * step, head_dim}; };
    fastbert::attention_backward(call, {grad.data(), step, head_dim}, {o.data(), step, head_dim}, lse.data(), of(0), of(1),
                                 of(2));
    for (const std::vector<float>* some : {&o, &lse, &gradient})
      for (const float x : *some) check(std::isfinite(x) && x != -7.0f, "every element is written");
    o.insert(o.end(), gradient.begin(), gradient.end());
    return o;
  };
  check(run(3) == run(1), "the same on several threads");
}

#if FASTBERT_X86
// Where the CPU has AVX-512, AVX2 says the same, up to rounding.
void test_attention_sets(std::int64_t head_dim, bool causal) {
  if (!fastbert::has_avx2()) return;
  const std::vector<std::int32_t> cu_seqlens{0, 1, 1, 38, 138};
  const std::int64_t tokens = cu_seqlens.back(), heads = 2, step = heads * head_dim;
  const std::vector<float> q = random_floats(tokens * step, 1), k = random_floats(tokens * step, 2),
                           v = random_floats(tokens * step, 3), grad = random_floats(tokens * step, 4);
  const auto heads_of = [&](const std::vector<float>& x) { return fastbert::Heads<const float>{x.data(), step, head_dim}; };
  const fastbert::AttentionCall call{heads_of(q),       heads_of(k), heads_of(v), heads, head_dim, tokens, 4,
                                     cu_seqlens.data(), 0.3f,        causal,      26,    1.1f,     5,      7,
                                     1};
  const auto run = [&](auto forward, auto backward) {
    std::vector<float> out(static_cast<std::size_t>(4 * tokens * step)), lse(static_cast<std::size_t>(tokens * heads));
    const auto part = [&](std::int64_t i) { return fastbert::Heads<float>{out.data() + i * tokens * step, step, head_dim}; };
    forward(call, part(0), lse.data());
    backward(call, heads_of(grad), {out.data(), step, head_dim}, lse.data(), part(1), part(2), part(3));
    out.insert(out.end(), lse.begin(), lse.end());
    return out;
  };
  const std::vector<float> best = run(fastbert::attention, fastbert::attention_backward),
                           narrow = run(fastbert::avx2::attention, fastbert::avx2::attention_backward);
  for (std::size_t i = 0; i < best.size(); ++i) check(std::fabs(best[i] - narrow[i]) < 1e-4f, "the same with AVX2");
}
#endif

void test_embeddings() {
  const std::int64_t N = 40, tokens = 50, rows = 30, step = N + 3;
  const std::vector<std::int32_t> cu_seqlens{0, 1, 1, 50};
  const std::vector<float> table = random_floats(rows * step - 3, 1), ones(static_cast<std::size_t>(N), 1.0f);
  std::vector<std::uint16_t> halves(static_cast<std::size_t>(rows * N), 0x3f80);  // 1
  std::vector<std::int64_t> ids(static_cast<std::size_t>(tokens));
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int64_t>(i * 7 + 1) % rows;
  ids.back() = rows - 1;
  if (!fastbert::can_encode(fastbert::Precision::fp32)) return;
  const auto encoder = fastbert::make_encoder(fastbert::Precision::fp32, {N, 3, 12, 8, 1e-12f, 0.3f, false, false});
  fastbert::Embeddings embeddings;
  embeddings.parts = {{{table.data(), false, rows, step}, ids.data()}, {{halves.data(), true, rows, N}, ids.data()}};
  const auto run = [&](bool first_only, int threads) {
    std::vector<float> out(static_cast<std::size_t>((first_only ? 3 : tokens) * N), -7.0f);
    encoder->run({&embeddings, nullptr, cu_seqlens.data(), 3, first_only, out.data(), threads}, {});
    return out;
  };
  const std::vector<float> sums = run(false, 1);
  for (std::size_t i = 0; i < ids.size(); ++i)
    for (std::size_t c = 0; c < static_cast<std::size_t>(N); ++c)
      check(sums[i * static_cast<std::size_t>(N) + c] ==
                table[static_cast<std::size_t>(ids[i] * step) + c] + 1.0f, "a sum of rows");
  check(run(false, 20) == sums, "the same on many threads");
  check(run(true, 1)[2 * static_cast<std::size_t>(N)] == sums[static_cast<std::size_t>(N)], "a first token");
  embeddings.norm = {ones.data(), ones.data()};
  const std::vector<float> normalised = run(false, 2);
  float sum = 0;
  for (std::size_t c = 0; c < static_cast<std::size_t>(N); ++c) sum += normalised[c];
  check(std::fabs(sum - static_cast<float>(N)) < 1e-3f, "the mean is the bias");
  for (const std::int64_t bad : {std::int64_t{-1}, rows, std::int64_t{1} << 60}) {
    ids[20] = bad;
    bool thrown = false;
    try {
      run(false, 2);
    } catch (const std::out_of_range&) {
      thrown = true;
    }
    check(thrown, "an id out of range");
  }
}

}  // namespace

int main() {
  test_packing();
  test_shares();
  test_mask();
  test_masking();
  test_sampling();
  test_encoder(false);
  test_encoder(true);
  for (const std::int64_t head_dim : {7, 32})
    for (const std::uint32_t threshold : {0u, 26u}) {
      test_attention(head_dim, false, threshold);
      test_attention(head_dim, true, threshold);
    }
#if FASTBERT_X86
  for (const std::int64_t head_dim : {7, 24, 64})
    for (const bool causal : {false, true}) test_attention_sets(head_dim, causal);
#endif
  test_embeddings();
  std::puts("all passed");
}
