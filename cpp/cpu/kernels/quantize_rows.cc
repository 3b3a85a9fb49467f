// Activations to 8-bit numbers with a scale per kActivationGroup.
//
// A scale is as large as the largest of its group needs it, so one outlier would cost all the others
// their precision. What stands far out of its group's average is therefore left to be multiplied as
// it is, in fp32: docs/decisions/0007-quantised-weights.md. All depends on the row alone.
#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

constexpr int kVectors = static_cast<int>(kActivationGroup) / 16;
// An outlier is larger than this many times the average magnitude: at most one in 16 is.
constexpr float kOutlierRatio = 16.0f;
// Below this, 127 over the largest magnitude could overflow; such a group is taken for zero.
constexpr float kTiny = 1e-35f;

ENGINE_INLINE Vec16 magnitude(Vec16 x) { return max(x, sub(zero(), x)); }

struct Group {
  const float* x;
  const float* column_scales;  // or null
  float* outliers;             // or null
  int64_t count;               // of k, up to kActivationGroup
};

ENGINE_INLINE void load_group(const Group& group, Vec16* x) {
  if (group.count == kActivationGroup) {
    for (int i = 0; i < kVectors; ++i) x[i] = load(group.x + i * 16);
    if (group.column_scales == nullptr) return;
    for (int i = 0; i < kVectors; ++i) x[i] = mul(x[i], load(group.column_scales + i * 16));
    return;
  }
  for (int i = 0; i < kVectors; ++i) {
    const int64_t left = group.count - i * 16;
    const int64_t n = left < 0 ? 0 : left < 16 ? left : 16;
    x[i] = load_first(group.x + i * 16, n);
    if (group.column_scales != nullptr) x[i] = mul(x[i], load_first(group.column_scales + i * 16, n));
  }
}

// One bit for each k whose magnitude is above the threshold.
ENGINE_INLINE void mark_outliers(const Group& group, const Vec16* x, float threshold, uint64_t* outliers) {
  for (int i = 0; i < kVectors; ++i) {
    outliers[i / 4] |= static_cast<uint64_t>(where_greater(magnitude(x[i]), set1(threshold))) << (i % 4 * 16);
  }
  if (group.outliers == nullptr) return;
  for (int word = 0; word < kVectors / 4; ++word) {
    for (uint64_t bits = outliers[word]; bits != 0; bits &= bits - 1) {
      const int64_t k = word * 64 + __builtin_ctzll(bits);
      group.outliers[k] = group.x[k];
    }
  }
}

// The scale; codes, the sums of the codes of each `kSumLen` k, and outliers are stored.
template <int kSumLen>
ENGINE_INLINE float quantize(const Group& group, int8_t* codes, float* code_sums, uint64_t* outliers) {
  Vec16 x[kVectors];
  load_group(group, x);
  Vec16 lane_sums = zero(), lane_maxima = zero();
  for (int i = 0; i < kVectors; ++i) {
    lane_sums = add(lane_sums, magnitude(x[i]));
    lane_maxima = max(lane_maxima, magnitude(x[i]));
  }
  const float total = reduce_add(lane_sums);
  const float threshold = total * (kOutlierRatio / static_cast<float>(group.count));
  const bool is_finite = total <= __FLT_MAX__;
  float largest = reduce_max(lane_maxima);
  outliers[0] = outliers[1] = 0;
  if (is_finite && largest > threshold) {
    mark_outliers(group, x, threshold, outliers);
    lane_maxima = zero();
    for (int i = 0; i < kVectors; ++i) {
      x[i] = zero_where_less(x[i], set1(threshold), magnitude(x[i]));
      lane_maxima = max(lane_maxima, magnitude(x[i]));
    }
    largest = reduce_max(lane_maxima);
  }
  if (!is_finite) {
    for (int i = 0; i < kVectors; ++i) x[i] = zero();
  }
  const bool is_zero = !is_finite || largest < kTiny;
  const Vec16 factor = set1(is_zero ? 0.0f : 127.0f / largest);
  const Vec16 kRound = set1(12582912.0f);  // adding 1.5 * 2^23 rounds to the nearest integer
  constexpr int kVectorsPerSum = kSumLen / 16;
  for (int i = 0; i < kVectors / kVectorsPerSum; ++i) {
    Vec16 sum = zero();
    for (int j = i * kVectorsPerSum; j < (i + 1) * kVectorsPerSum; ++j) {
      const Vec16 code = sub(add(mul(x[j], factor), kRound), kRound);
      store_bytes(codes + j * 16, code);
      sum = add(sum, code);
    }
    code_sums[i] = reduce_add(sum);
  }
  // Not a number or infinite: so is the whole row of outputs, and no other.
  return !is_finite ? __builtin_nanf("") : is_zero ? 0.0f : largest / 127.0f;
}

template <int kSumLen>
void quantize_row(const QuantizeRowsArgs& args, int64_t row) {
  const QuantizedRows& rows = args.rows;
  constexpr int kNumSums = static_cast<int>(kActivationGroup) / kSumLen;
  uint64_t* outliers = rows.outliers + row * rows.padded_k / 64;
  for (int64_t g = 0; g * kActivationGroup < args.in_features; ++g) {
    const int64_t k = g * kActivationGroup;
    const int64_t left = args.in_features - k;
    const Group group = {args.x + row * args.x_stride + k,
                         args.column_scales == nullptr ? nullptr : args.column_scales + k,
                         args.outliers == nullptr ? nullptr : args.outliers + row * args.outliers_stride + k,
                         left < kActivationGroup ? left : kActivationGroup};
    float sums[kNumSums];
    rows.scales[g * rows.row_stride + row] =
        quantize<kSumLen>(group, rows.codes + row * rows.padded_k + k, sums, outliers + g * 2);
    rows.has_outliers[g * rows.row_stride + row] = (outliers[g * 2] | outliers[g * 2 + 1]) != 0;
    for (int i = 0; i < kNumSums; ++i) {
      rows.offsets[(g * kNumSums + i) * rows.row_stride + row] =
          -args.weight_zero * static_cast<int32_t>(sums[i]);
    }
  }
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (args.group_len == 32) {
      quantize_row<32>(args, row);
    } else {
      quantize_row<128>(args, row);
    }
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
