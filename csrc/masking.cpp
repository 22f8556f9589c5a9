#include "masking.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace fastbert {

Vocabulary::Vocabulary(const std::uint8_t* kinds_in, std::int64_t size, std::int32_t mask_in)
    : kinds(kinds_in, kinds_in + size), mask(mask_in) {
  for (std::int64_t id = 0; id < size; ++id) {
    if ((kinds[static_cast<std::size_t>(id)] & kSpecial) == 0) ordinary.push_back(static_cast<std::int32_t>(id));
  }
  if (mask < 0 || mask >= size) throw std::invalid_argument("the mask token is not in the vocabulary");
  if (ordinary.empty()) throw std::invalid_argument("the vocabulary has only special tokens");
}

void Masking::check() const {
  const auto share = [](double value, const char* name) {
    if (!(value >= 0.0 && value <= 1.0)) throw std::invalid_argument(std::string(name) + " must be in [0, 1]");
  };
  share(rate, "rate");
  share(replace_by_mask, "replace_by_mask");
  share(replace_by_random, "replace_by_random");
  if (replace_by_mask + replace_by_random > 1.0 + 1e-9)
    throw std::invalid_argument("replace_by_mask and replace_by_random must not add up to more than 1");
  if (max_predictions < 0) throw std::invalid_argument("max_predictions must not be negative");
  if (!(span_p > 0.0 && span_p <= 1.0)) throw std::invalid_argument("span_p must be in (0, 1]");
  if (max_span < 1) throw std::invalid_argument("max_span must be at least 1");
}

Masker::Masker(const Masking& masking, const Vocabulary& vocabulary) : masking_(masking), vocabulary_(vocabulary) {
  masking.check();
  double probability = masking.span_p, sum = 0.0;
  for (int words = 1; words <= masking.max_span; ++words, probability *= 1.0 - masking.span_p) {
    span_cdf_.push_back(sum += probability);
  }
  for (double& p : span_cdf_) p /= sum;  // spans longer than the longest are drawn again
}

void Masker::corrupt(Random& random, std::int64_t* ids, std::int64_t* labels, std::int64_t length,
                     const std::uint8_t* unit_starts, std::int64_t first_row, std::vector<std::int64_t>& rows) {
  std::fill_n(labels, length, std::int64_t{-100});
  chosen_.clear();
  if (masking_.unit == Masking::Unit::token) {
    choose_tokens(random, ids, length);
  } else {
    find_units(ids, length, unit_starts);
    const std::int64_t wanted = target(random, static_cast<std::int64_t>(unit_of_.size()));
    if (masking_.unit == Masking::Unit::word) {
      choose_units(random, wanted);
    } else {
      choose_spans(random, wanted);
    }
  }
  std::sort(chosen_.begin(), chosen_.end(), [](const Range& a, const Range& b) { return a.start < b.start; });
  const auto ordinary = static_cast<std::uint32_t>(vocabulary_.ordinary.size());
  for (const Range& range : chosen_) {
    const double fate = random.uniform();
    for (std::int64_t i = range.start; i < range.end; ++i) {
      labels[i] = ids[i];
      rows.push_back(first_row + i);
      if (fate < masking_.replace_by_mask) {
        ids[i] = vocabulary_.mask;
      } else if (fate < masking_.replace_by_mask + masking_.replace_by_random) {
        ids[i] = vocabulary_.ordinary[random.below(ordinary)];
      }
    }
  }
}

std::int64_t Masker::target(Random& random, std::int64_t candidates) const {
  if (candidates == 0 || masking_.rate == 0.0) return 0;
  const double exact = masking_.rate * static_cast<double>(candidates);
  auto rounded = static_cast<std::int64_t>(exact);
  if (random.uniform() < exact - static_cast<double>(rounded)) ++rounded;
  rounded = std::max<std::int64_t>(rounded, 1);
  return masking_.max_predictions > 0 ? std::min(rounded, masking_.max_predictions) : rounded;
}

void Masker::choose_tokens(Random& random, const std::int64_t* ids, std::int64_t length) {
  places_.resize(static_cast<std::size_t>(length));
  std::int32_t* places = places_.data();
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    places[count] = static_cast<std::int32_t>(i);
    count += (vocabulary_.kinds[static_cast<std::size_t>(ids[i])] & Vocabulary::kSpecial) == 0;
  }
  const std::int64_t wanted = target(random, count);
  for (std::int64_t i = 0; i < wanted; ++i) {
    const std::int64_t other = i + random.below(static_cast<std::uint32_t>(count - i));
    std::swap(places[i], places[other]);
    chosen_.push_back({places[i], places[i] + 1});
  }
}

void Masker::find_units(const std::int64_t* ids, std::int64_t length, const std::uint8_t* unit_starts) {
  units_.clear();
  runs_.clear();
  unit_of_.clear();
  bool after_special = true;
  for (std::int64_t i = 0; i < length; ++i) {
    const std::uint8_t kind = vocabulary_.kinds[static_cast<std::size_t>(ids[i])];
    if ((kind & Vocabulary::kSpecial) != 0) {
      after_special = true;
      continue;
    }
    const bool starts = unit_starts != nullptr ? unit_starts[i] != 0 : (kind & Vocabulary::kContinuation) == 0;
    const auto place = static_cast<std::int32_t>(i);
    if (starts || after_special) {
      const auto unit = static_cast<std::int32_t>(units_.size());
      if (after_special) runs_.push_back({unit, unit});
      units_.push_back({place, place + 1});
      runs_.back().end = unit + 1;
    } else {
      units_.back().end = place + 1;
    }
    unit_of_.push_back(static_cast<std::int32_t>(units_.size()) - 1);
    after_special = false;
  }
}

// Think of the units in a random order around a circle, and of `target` tokens from a random one on. A unit of n tokens
// lies in there wholly in target - n + 1 of the places that it may have, and with one of its ends in 2 (n - 1). Taken
// always in the former and half the time in the latter, every unit has the same chance, and it is the rate.
void Masker::choose_units(Random& random, std::int64_t target) {
  if (target == 0) return;
  const auto units = static_cast<std::uint32_t>(units_.size());
  const auto token = random.below(static_cast<std::uint32_t>(unit_of_.size()));
  std::int64_t passed = 0, chosen = 0;
  for (std::uint32_t i = 0; i < units && (passed < target || chosen == 0); ++i) {
    std::uint32_t next = i + random.below(units - i);
    std::int64_t before = 0;  // tokens of the unit that lie before the first one
    if (i == 0) {
      next = static_cast<std::uint32_t>(unit_of_[token]);
      before = token - (std::lower_bound(unit_of_.begin(), unit_of_.end(), unit_of_[token]) - unit_of_.begin());
    }
    std::swap(units_[i], units_[next]);
    const Range unit = units_[i];
    const std::int64_t size = unit.end - unit.start;
    if (!fits(chosen + size)) continue;
    const bool whole = before == 0 && passed + size <= target;
    const double chance = size <= target ? 0.5 : static_cast<double>(target) / static_cast<double>(target + size - 1);
    const bool only = i + 1 == units && chosen == 0;  // none is left that could be the one at least
    if (whole || only || passed >= target || random.uniform() < chance) {
      for (std::int32_t place = unit.start; place < unit.end; ++place) chosen_.push_back({place, place + 1});
      chosen += size;
    }
    passed += size - before;
  }
}

void Masker::choose_spans(Random& random, std::int64_t target) {
  const auto units = static_cast<std::int32_t>(units_.size());
  const auto runs = static_cast<std::int32_t>(runs_.size());
  taken_.assign(units_.size(), 0);
  std::int64_t chosen = 0;
  for (std::int64_t attempts = 20 * std::int64_t{units}; attempts > 0 && chosen < target; --attempts) {
    const auto drawn = std::upper_bound(span_cdf_.begin(), span_cdf_.end() - 1, random.uniform());
    const auto words = static_cast<std::int32_t>(std::min<std::int64_t>(1 + (drawn - span_cdf_.begin()), target - chosen));
    // A span may begin before its run and end behind it, and is cut there: so all words are equally likely.
    auto place = static_cast<std::int32_t>(random.below(static_cast<std::uint32_t>(units + runs * (words - 1))));
    std::size_t run = 0;
    for (; place >= runs_[run].end - runs_[run].start + words - 1; ++run) {
      place -= runs_[run].end - runs_[run].start + words - 1;
    }
    const std::int32_t start = runs_[run].start + place - (words - 1);
    std::int32_t first = std::max(start, runs_[run].start), end = std::min(start + words, runs_[run].end);
    if (std::any_of(taken_.begin() + first, taken_.begin() + end, [](std::uint8_t taken) { return taken != 0; })) continue;
    // Words that would be too many go from one side; the one that is half too many, with the chance that keeps the rate.
    const bool from_left = (random.next() & 1) != 0;
    std::int64_t size = units_[static_cast<std::size_t>(end - 1)].end - units_[static_cast<std::size_t>(first)].start;
    bool last = false;
    while (end > first && chosen + size > target) {
      const Range edge = units_[static_cast<std::size_t>(from_left ? first : end - 1)];
      const std::int64_t rest = size - (edge.end - edge.start), missing = target - chosen - rest;
      if (missing > 0 && fits(chosen + size) &&
          random.uniform() * static_cast<double>(size - rest) < static_cast<double>(missing))
        break;
      last = missing > 0;
      size = rest;
      from_left ? ++first : --end;
    }
    if (end > first) {
      std::fill(taken_.begin() + first, taken_.begin() + end, std::uint8_t{1});
      chosen_.push_back({units_[static_cast<std::size_t>(first)].start, units_[static_cast<std::size_t>(end - 1)].end});
      chosen += size;
    }
    if (last && chosen > 0) break;
  }
}

std::vector<std::int64_t> corrupt(const Vocabulary& vocabulary, const Masking& masking, const std::int64_t* ids,
                                  std::int64_t tokens, const std::int64_t* cu_seqlens, std::int64_t count, std::uint64_t seed,
                                  std::uint64_t epoch, std::uint64_t first_index, const std::uint8_t* unit_starts, int threads,
                                  std::int64_t* corrupted, std::int64_t* labels) {
  constexpr std::int64_t kChunk = 64;  // sequences that one thread corrupts
  if (cu_seqlens[0] != 0 || cu_seqlens[count] != tokens || !std::is_sorted(cu_seqlens, cu_seqlens + count + 1))
    throw std::invalid_argument("cu_seqlens must rise from 0 to the number of ids");
  const auto size = static_cast<std::int64_t>(vocabulary.kinds.size());
  if (std::any_of(ids, ids + tokens, [=](std::int64_t id) { return id < 0 || id >= size; }))
    throw std::invalid_argument("an id is not in the vocabulary");
  const std::int64_t chunks = (count + kChunk - 1) / kChunk;
  std::vector<std::vector<std::int64_t>> rows(static_cast<std::size_t>(chunks));
  parallel_for(chunks, threads, [&](std::int64_t chunk) {
    Masker masker(masking, vocabulary);
    for (std::int64_t i = chunk * kChunk; i < std::min(count, (chunk + 1) * kChunk); ++i) {
      const std::int64_t first = cu_seqlens[i], length = cu_seqlens[i + 1] - first;
      std::copy_n(ids + first, length, corrupted + first);
      Random random(Random::Use::masking, seed, epoch, first_index + static_cast<std::uint64_t>(i));
      masker.corrupt(random, corrupted + first, labels + first, length,
                     unit_starts == nullptr ? nullptr : unit_starts + first, first, rows[static_cast<std::size_t>(chunk)]);
    }
  });
  std::vector<std::int64_t> all;
  for (const auto& chosen : rows) all.insert(all.end(), chosen.begin(), chosen.end());
  return all;
}

}  // namespace fastbert
