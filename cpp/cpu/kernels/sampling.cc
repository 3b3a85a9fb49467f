#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = __FLT_MAX__;

// Tokens whose exponentials are added in float before the sum goes on in double.
constexpr int64_t kChunk = 1024;

// One row of the batch: raw logits, or the copy that becomes biased logits and then weights.
struct Row {
  float* x;        // [V]
  int64_t num;     // V
  uint32_t* seen;  // [ceil(V / 32)], scratch
};

// NaN becomes -infinity and +infinity the largest number, so that a broken logit can neither win
// silently nor turn the others into NaN.
ENGINE_INLINE Vec16 cleaned(Vec16 x) { return min(max(x, set1(-kInfinity)), set1(kLargest)); }

ENGINE_INLINE Vec16 load_logits(const Row& row, int64_t i) {
  const int64_t left = row.num - i;
  if (left >= 16) return load(row.x + i);
  float buffer[16];
  store(buffer, set1(-kInfinity));
  for (int64_t j = 0; j < left; ++j) buffer[j] = row.x[i + j];
  return load(buffer);
}

ENGINE_INLINE void store_logits(const Row& row, int64_t i, Vec16 lanes) {
  const int64_t left = row.num - i;
  if (left >= 16) {
    store(row.x + i, lanes);
  } else {
    store_first(row.x + i, lanes, left);
  }
}

// Penalties and weights are worked out in a copy: raw log-probabilities need the logits as they were.
void clean_and_copy(const Row& raw, const Row& work) {
  for (int64_t i = 0; i < raw.num; i += 16) {
    const Vec16 lanes = cleaned(load_logits(raw, i));
    store_logits(raw, i, lanes);
    store_logits(work, i, lanes);
  }
}

void clean(const Row& raw) {
  for (int64_t i = 0; i < raw.num; i += 16) store_logits(raw, i, cleaned(load_logits(raw, i)));
}

float row_max(const Row& row) {
  Vec16 best = set1(-kInfinity);
  for (int64_t i = 0; i < row.num; i += 16) best = max(best, load_logits(row, i));
  return reduce_max(best);
}

// The lowest id among the largest logits, -1 when every token is ruled out. Only the first chunk that
// holds the largest is looked through token by token.
int64_t argmax(const Row& row) {
  float best = -kInfinity;
  int64_t best_chunk = row.num;
  for (int64_t begin = 0; begin < row.num; begin += kChunk) {
    const int64_t end = begin + kChunk < row.num ? begin + kChunk : row.num;
    Vec16 lane_maxima = set1(-kInfinity);
    for (int64_t i = begin; i < end; i += 16) lane_maxima = max(lane_maxima, load_logits(row, i));
    const float largest = reduce_max(lane_maxima);
    if (!(largest > best)) continue;
    best = largest;
    best_chunk = begin;
  }
  for (int64_t i = best_chunk; i < row.num; ++i) {
    if (row.x[i] == best) return i;
  }
  return -1;
}

// --- log-probabilities --------------------------------------------------------------------------

// log(sum(exp(x))) of a row with a finite maximum.
double log_sum_exp(const Row& row, float row_maximum) {
  const Vec16 shift = set1(row_maximum);
  double total = 0;
  for (int64_t begin = 0; begin < row.num; begin += kChunk) {
    const int64_t end = begin + kChunk < row.num ? begin + kChunk : row.num;
    Vec16 sum = zero();
    for (int64_t i = begin; i < end; i += 16) sum = add(sum, exp(sub(load_logits(row, i), shift)));
    total += static_cast<double>(reduce_add(sum));
  }
  return static_cast<double>(row_maximum) + __builtin_log(total);
}

// The `count` largest logits, best first, lower ids first among equals.
void select_top(const Row& row, int64_t count, int32_t* ids, float* values) {
  if (count == 0) return;
  int64_t found = 0;
  for (int64_t i = 0; i < row.num; i += 16) {
    if (found == count && !(reduce_max(load_logits(row, i)) > values[count - 1])) continue;
    const int64_t end = i + 16 < row.num ? i + 16 : row.num;
    for (int64_t j = i; j < end; ++j) {
      const float value = row.x[j];
      if (found == count && !(value > values[count - 1])) continue;
      int64_t at = found < count ? found++ : count - 1;
      for (; at > 0 && value > values[at - 1]; --at) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
      }
      values[at] = value;
      ids[at] = static_cast<int32_t>(j);
    }
  }
}

// `Args` are those of either kernel: what is drawn and what is scored get the same numbers.
template <typename Args>
void write_logprobs(const Row& row, const Args& args, int64_t r, int64_t token) {
  const float best = row_max(row);
  const bool is_normalised = !args.reports_logits && best > -kInfinity;
  const double normaliser = is_normalised ? log_sum_exp(row, best) : 0;
  const int64_t num_top = args.num_top_logprobs[r];
  float* values = args.top_logprobs + r * args.top_stride;
  select_top(row, num_top, args.top_ids + r * args.top_stride, values);
  for (int64_t i = 0; i < num_top; ++i) {
    values[i] = static_cast<float>(static_cast<double>(values[i]) - normaliser);
  }
  args.out_logprobs[r] = static_cast<float>(static_cast<double>(row.x[token]) - normaliser);
}

// --- penalties, bias, mask -----------------------------------------------------------------------

void clear_seen(const Row& row) {
  for (int64_t i = 0; i < (row.num + 31) / 32; ++i) row.seen[i] = 0;
}

// Whether `id` is met for the first time since clear_seen().
bool is_first(const Row& row, int32_t id) {
  uint32_t& word = row.seen[id / 32];
  const uint32_t bit = 1u << (id % 32);
  const bool first = (word & bit) == 0;
  word |= bit;
  return first;
}

void apply_penalties(const Row& row, const SamplingArgs& args, int64_t r) {
  const int32_t* tokens = args.token_ids + args.token_indptr[r];
  const int64_t num_tokens = args.token_indptr[r + 1] - args.token_indptr[r];
  const float repetition = args.repetition_penalty[r];
  if (repetition != 1.0f) {
    clear_seen(row);
    for (int64_t i = 0; i < num_tokens; ++i) {
      if (!is_first(row, tokens[i])) continue;
      float& x = row.x[tokens[i]];
      x = x > 0 ? x / repetition : x * repetition;
      if (x > kLargest) x = kLargest;
    }
  }
  const float frequency = args.frequency_penalty[r];
  const float presence = args.presence_penalty[r];
  if (frequency != 0.0f || presence != 0.0f) {
    clear_seen(row);
    for (int64_t i = args.prompt_lens[r]; i < num_tokens; ++i) {
      float& x = row.x[tokens[i]];
      x -= frequency;
      if (is_first(row, tokens[i])) x -= presence;
    }
  }
}

void apply_bias_and_mask(const Row& row, const SamplingArgs& args, int64_t r) {
  for (int64_t i = args.bias_indptr[r]; i < args.bias_indptr[r + 1]; ++i) {
    row.x[args.bias_ids[i]] += args.bias_values[i];
  }
  if (args.bitmask == nullptr) return;
  const int32_t* mask = args.bitmask + r * args.bitmask_stride;
  for (int64_t begin = 0; begin < row.num; begin += 32) {
    const uint32_t allowed = static_cast<uint32_t>(mask[begin / 32]);
    if (allowed == ~0u) continue;  // rows without a constraint, and most words of free text
    const int64_t count = row.num - begin < 32 ? row.num - begin : 32;
    float* x = row.x + begin;
    for (int64_t j = 0; j < count; ++j) x[j] = (allowed >> j) & 1u ? x[j] : -kInfinity;
  }
}

// --- filters ------------------------------------------------------------------------------------

// An unsigned number that orders like the float.
ENGINE_INLINE uint32_t order_key(float x) {
  x += 0.0f;  // -0 becomes 0
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// Keys are narrowed from the top in three digits of at most 11 bits.
constexpr int kNumDigits = 3;
constexpr int kDigitShift[kNumDigits] = {21, 10, 0};
constexpr uint32_t kDigitSize[kNumDigits] = {2048, 2048, 1024};
constexpr int kMaxDigitSize = 2048;

// Elements above `key` stay; of those equal to it, the first `num_equal` by token id.
struct Cut {
  uint32_t key;
  int64_t num_equal;
  bool is_reached;  // else the target is more than there is
};

// As many tokens as share a word of `seen`, whose memory holds the largest of each block.
constexpr int64_t kBlock = 32;

Row block_maxima(const Row& row) {
  const Row maxima{reinterpret_cast<float*>(row.seen), (row.num + kBlock - 1) / kBlock, nullptr};
  for (int64_t block = 0; block < maxima.num; ++block) {
    const int64_t i = block * kBlock;
    Vec16 largest = load_logits(row, i);
    if (i + 16 < row.num) largest = max(largest, load_logits(row, i + 16));
    maxima.x[block] = reduce_max(largest);
  }
  return maxima;
}

// Calls `visit` with all elements whose key is `lowest` or more, and others of their blocks.
template <typename Visit>
ENGINE_INLINE void visit_from(const Row& row, const Row* maxima, uint32_t lowest, const Visit& visit) {
  for (int64_t begin = 0; begin < row.num; begin += kBlock) {
    if (maxima != nullptr && order_key(maxima->x[begin / kBlock]) < lowest) continue;
    const int64_t end = begin + kBlock < row.num ? begin + kBlock : row.num;
    for (int64_t i = begin; i < end; ++i) visit(row.x[i]);
  }
}

// Finds where the running total, from the largest element down, first reaches `target`; an element
// counts `Weight::of(x)`. Three passes over the row, no sorting. What is below `lowest` may be left out.
template <typename Weight>
Cut find_cut(const Row& row, const Row* maxima, uint32_t lowest, double target) {
  bool is_reached = false;
  uint32_t prefix = 0;
  double above = 0;
  double weight_at_key = 1;
  for (int digit = 0; digit < kNumDigits; ++digit) {
    double totals[kMaxDigitSize] = {};
    const int shift = kDigitShift[digit];
    const uint32_t size = kDigitSize[digit];
    // The bits of the digits before this one, which `prefix` fixes.
    const uint32_t known = digit == 0 ? 0 : ~0u << kDigitShift[digit - 1];
    visit_from(row, maxima, lowest, [&](float x) {
      const uint32_t key = order_key(x);
      if ((key & known) == prefix) totals[(key >> shift) & (size - 1)] += Weight::of(x);
    });
    // The lowest digit with any weight is taken when rounding keeps the target out of reach.
    uint32_t chosen = 0;
    is_reached = false;
    double before_chosen = above;
    for (uint32_t d = size; d-- > 0 && !is_reached;) {
      if (totals[d] == 0) continue;
      chosen = d;
      before_chosen = above;
      above += totals[d];
      is_reached = above >= target;
    }
    weight_at_key = totals[chosen];
    above = before_chosen;
    prefix |= chosen << shift;
  }
  // All elements at the cut are equal, so each weighs the same.
  float value;
  const uint32_t bits = (prefix & 0x80000000u) ? prefix & 0x7fffffffu : ~prefix;
  __builtin_memcpy(&value, &bits, sizeof(value));
  const double each = Weight::of(value);
  int64_t num_equal = 1;
  if (each > 0) {
    const double missing = (target - above) / each;
    const int64_t num_present = static_cast<int64_t>(weight_at_key / each + 0.5);
    num_equal = missing >= static_cast<double>(num_present) ? num_present
                                                            : static_cast<int64_t>(__builtin_ceil(missing));
    if (num_equal < 1) num_equal = 1;
  }
  return {prefix, num_equal, is_reached};
}

// What an element counts, and the least key of those that count anything.
struct CountOne {
  static double of(float) { return 1.0; }
  static constexpr uint32_t kLeast = 0;
};
struct WeightItself {
  static double of(float x) { return static_cast<double>(x); }
  static constexpr uint32_t kLeast = 0x80000001u;  // weights are never negative, and zeros are passed over
};

// Where the largest of the blocks reach the target by themselves, the cut is not below theirs: all but a few
// blocks need no second look. The target is a hair more for them, so that rounding makes no difference.
template <typename Weight>
void cut_off(const Row& row, double target, float dropped) {
  const Row maxima = block_maxima(row);
  const Cut bound = find_cut<Weight>(maxima, nullptr, 0, target * (1 + 1e-6));
  Cut cut = find_cut<Weight>(row, &maxima, bound.is_reached ? bound.key : Weight::kLeast, target);
  for (int64_t begin = 0; begin < row.num; begin += kBlock) {
    const int64_t end = begin + kBlock < row.num ? begin + kBlock : row.num;
    if (order_key(maxima.x[begin / kBlock]) < cut.key) {
      for (int64_t i = begin; i < end; i += 16) store_logits(row, i, set1(dropped));
      continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t key = order_key(row.x[i]);
      if (key > cut.key) continue;
      if (key == cut.key && cut.num_equal > 0) {
        --cut.num_equal;
        continue;
      }
      row.x[i] = dropped;
    }
  }
}

// --- drawing ------------------------------------------------------------------------------------

// Logits to weights exp((x - max) / temperature): the largest is 1.
void to_weights(const Row& row, float temperature) {
  const Vec16 shift = set1(row_max(row));
  const Vec16 divisor = set1(temperature);
  for (int64_t i = 0; i < row.num; i += 16) {
    store_logits(row, i, exp(div(sub(load_logits(row, i), shift), divisor)));
  }
}

double chunk_weight(const Row& row, int64_t begin) {
  const int64_t end = begin + kChunk < row.num ? begin + kChunk : row.num;
  Vec16 sum = zero();
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) sum = add(sum, load(row.x + i));
  sum = add(sum, load_first(row.x + i, end - i));
  return static_cast<double>(reduce_add(sum));
}

double total_weight(const Row& row) {
  double total = 0;
  for (int64_t begin = 0; begin < row.num; begin += kChunk) total += chunk_weight(row, begin);
  return total;
}

// Philox4x32-10 (Salmon et al. 2011), first two of the four words.
// Uniform in (0, 1), a function of (seed, choice, position) and nothing else.
double uniform(uint64_t seed, uint32_t choice, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = choice,
           c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0;
    const uint64_t p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = ((static_cast<uint64_t>(c0) << 32) | c1) >> 11;
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

// The token in whose interval u * total falls, intervals laid out by token id.
int64_t draw(const Row& row, double u) {
  const double target = u * total_weight(row);
  double before = 0;
  int64_t last_chunk = row.num;
  bool is_here = false;
  for (int64_t begin = 0; begin < row.num; begin += kChunk) {
    const double weight = chunk_weight(row, begin);
    if (weight == 0) continue;
    last_chunk = begin;
    is_here = before + weight > target;
    if (is_here) break;
    before += weight;
  }
  const int64_t end = last_chunk + kChunk < row.num ? last_chunk + kChunk : row.num;
  int64_t last = -1;  // falls back here when rounding carries the walk past the end
  for (int64_t i = last_chunk; i < end; ++i) {
    if (row.x[i] == 0) continue;
    last = i;
    if (!is_here) continue;
    before += static_cast<double>(row.x[i]);
    if (before > target) break;
  }
  return last;
}

void copy(const Row& from, const Row& to) {
  for (int64_t i = 0; i < from.num; i += 16) store_logits(to, i, load_logits(from, i));
}

// Logits over temperature. A shift changes no log-probability, and keeps the digits of small differences.
void copy_scaled(const Row& from, const Row& to, float shift, float temperature) {
  const Vec16 subtrahend = set1(shift), divisor = set1(temperature);
  for (int64_t i = 0; i < from.num; i += 16) {
    store_logits(to, i, cleaned(div(sub(load_logits(from, i), subtrahend), divisor)));
  }
}

// Temperature 0 and nothing that would change the logits: they need no copy.
bool takes_likeliest(const SamplingArgs& args, int64_t r) {
  return args.temperature[r] < kGreedyTemperature && args.repetition_penalty[r] == 1.0f &&
         args.frequency_penalty[r] == 0.0f && args.presence_penalty[r] == 0.0f &&
         args.bias_indptr[r] == args.bias_indptr[r + 1] && args.bitmask == nullptr;
}

// `processed`, unless null, becomes the logits that the token is drawn from, up to a constant if they are
// not reported themselves: tokens that a filter dropped are -infinity, and temperature 0 leaves all as it is.
int64_t sample_row(const Row& row, const Row* processed, const SamplingArgs& args, int64_t r) {
  apply_penalties(row, args, r);
  apply_bias_and_mask(row, args, r);
  const int64_t best = argmax(row);
  const float temperature = args.temperature[r];
  if (best < 0 || temperature < kGreedyTemperature) {
    if (processed != nullptr) copy(row, *processed);
    return best;
  }

  const int64_t top_k = args.top_k[r];
  if (top_k > 0 && top_k < row.num) {
    cut_off<CountOne>(row, static_cast<double>(top_k), -kInfinity);
  }
  if (processed != nullptr) {
    copy_scaled(row, *processed, args.reports_logits ? 0.0f : row.x[best], temperature);
  }
  to_weights(row, temperature);
  const float top_p = args.top_p[r];
  if (top_p < 1.0f) {
    cut_off<WeightItself>(row, static_cast<double>(top_p) * total_weight(row), 0.0f);
  }
  const float min_p = args.min_p[r];
  if (min_p > 0.0f) {
    for (int64_t i = 0; i < row.num; ++i) row.x[i] = row.x[i] < min_p ? 0.0f : row.x[i];
  }
  if (processed != nullptr && (top_p < 1.0f || min_p > 0.0f)) {
    for (int64_t i = 0; i < row.num; ++i) {
      if (row.x[i] == 0.0f) processed->x[i] = -kInfinity;
    }
  }
  return draw(row, uniform(static_cast<uint64_t>(args.seeds[r]), static_cast<uint32_t>(args.choices[r]),
                           static_cast<uint64_t>(args.positions[r])));
}

}  // namespace

void sample(const SamplingArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    uint32_t* seen = args.seen + r * args.seen_stride;
    const Row raw{args.logits + r * args.logits_stride, args.vocab_size, seen};
    Row work{args.workspace + r * args.workspace_stride, args.vocab_size, seen};
    if (takes_likeliest(args, r)) {
      work = raw;
      clean(raw);
    } else {
      clean_and_copy(raw, work);
    }
    const bool has_scores = args.num_top_logprobs[r] >= 0;
    const int64_t token = sample_row(work, has_scores && args.reports_processed ? &raw : nullptr, args, r);
    args.out_ids[r] = static_cast<int32_t>(token);
    if (token >= 0 && has_scores) write_logprobs(raw, args, r, token);
  }
}

void score_tokens(const ScoringArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const Row raw{args.logits + r * args.logits_stride, args.vocab_size, nullptr};
    clean(raw);
    write_logprobs(raw, args, r, args.token_ids[r]);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
