#include "cpu/packed_matrix.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"

namespace engine::cpu {
namespace {

constexpr int64_t kMaxFeatures = int64_t{1} << 24;
// A block of k in all columns of a panel stays in the first-level cache while it is transposed.
constexpr int64_t kBlock = 64;

int64_t checked_features(int64_t value, const char* name) {
  if (value < 1 || value > kMaxFeatures) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + ": expected 1 to " +
                                                 std::to_string(kMaxFeatures) + ", got " +
                                                 std::to_string(value));
  }
  return value;
}

int64_t bytes_per_weight(WeightFormat format) { return format == WeightFormat::kBFloat16 ? 2 : 4; }

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float to_float(float value) { return value; }
float to_float(Bf16 value) { return from_bits(uint32_t{value.bits} << 16); }
float to_float(Fp16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero or subnormal: an exact multiple of 2^-24
    return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));
  }
  const uint32_t exponent_shift = magnitude < 0x7c00u ? (127u - 15u) << 23 : (255u - 31u) << 23;
  return from_bits(sign | ((magnitude << 13) + exponent_shift));
}

void convert(float value, float& stored) { stored = value; }
void convert(float value, Bf16& stored) {
  const uint32_t bits = to_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  // Rounding could carry a NaN to infinity or to zero; it becomes a quiet NaN instead.
  stored.bits = static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
}

// Where column `column` of a panel stands in each of its k-rows.
int64_t position(int64_t column, const float*) { return column; }
int64_t position(int64_t column, const Bf16*) { return column % 16 * 2 + column / 16; }

// Packs those of the panel's columns that `rows` has: [first, last) are rows of the matrix.
template <typename Source, typename Stored>
void pack_panel(const TensorView& rows, int64_t row_start, int64_t first, int64_t last, Stored* panel) {
  const int64_t num_k = rows.shape[1];
  for (int64_t begin = 0; begin < num_k; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, num_k);
    for (int64_t row = first; row < last; ++row) {
      const Source* source = rows.as<const Source>() + (row - row_start) * rows.strides[0];
      Stored* column = panel + position(row % kPanelColumns, panel);
      for (int64_t k = begin; k < end; ++k) convert(to_float(source[k]), column[k * kPanelColumns]);
    }
  }
}

template <typename Source, typename Stored>
void pack(ThreadPool& pool, const TensorView& rows, int64_t row_start, Stored* panels) {
  const int64_t row_end = row_start + rows.shape[0];
  const int64_t first_panel = row_start / kPanelColumns;
  const int64_t num_panels = (row_end + kPanelColumns - 1) / kPanelColumns - first_panel;
  pool.parallel_for(num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = first_panel + begin; panel < first_panel + end; ++panel) {
      const int64_t first = std::max(row_start, panel * kPanelColumns);
      const int64_t last = std::min(row_end, (panel + 1) * kPanelColumns);
      pack_panel<Source>(rows, row_start, first, last, panels + panel * kPanelColumns * rows.shape[1]);
    }
  });
}

template <typename Stored>
void pack_any(ThreadPool& pool, const TensorView& rows, int64_t row_start, void* panels) {
  Stored* stored = static_cast<Stored*>(panels);
  switch (rows.dtype) {
    case DType::kFloat32: return pack<float>(pool, rows, row_start, stored);
    case DType::kFloat16: return pack<Fp16>(pool, rows, row_start, stored);
    default: return pack<Bf16>(pool, rows, row_start, stored);
  }
}

}  // namespace

PackedMatrix::PackedMatrix(int64_t out_features, int64_t in_features, WeightFormat format)
    : out_features_(checked_features(out_features, "out_features")),
      in_features_(checked_features(in_features, "in_features")),
      format_(format),
      buffer_((out_features + kPanelColumns - 1) / kPanelColumns * kPanelColumns * in_features *
              bytes_per_weight(format)),
      is_packed_(static_cast<size_t>(out_features)),
      num_missing_(out_features) {}

void PackedMatrix::pack_rows(ThreadPool& pool, int64_t row_start, const TensorView& weight) {
  Dim n("n"), K("K", in_features_);
  expect(weight, "weight", {DType::kFloat32, DType::kBFloat16, DType::kFloat16}, {n, K}, Layout::kRows);
  if (row_start < 0 || row_start > out_features_ - n) {
    throw Error(ErrorCode::kInvalidArgument, "row_start: " + std::to_string(n) + " rows from " +
                                                 std::to_string(row_start) + " on, but the matrix has " +
                                                 std::to_string(out_features_));
  }
  if (format_ == WeightFormat::kBFloat16) {
    pack_any<Bf16>(pool, weight, row_start, buffer_.data());
  } else {
    pack_any<float>(pool, weight, row_start, buffer_.data());
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int64_t row = row_start; row < row_start + n; ++row) {
    num_missing_ -= is_packed_[static_cast<size_t>(row)] ? 0 : 1;
    is_packed_[static_cast<size_t>(row)] = true;
  }
}

bool PackedMatrix::is_complete() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_missing_ == 0;
}

}  // namespace engine::cpu
