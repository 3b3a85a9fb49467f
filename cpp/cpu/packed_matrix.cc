#include "cpu/packed_matrix.h"

#include <algorithm>
#include <string>

#include "cpu/float_formats.h"
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

// Packs those of the panel's columns that `rows` has: [first, last) are rows of the matrix.
template <typename Source, typename Stored>
void pack_panel(const TensorView& rows, int64_t row_start, int64_t first, int64_t last, Stored* panel) {
  const int64_t num_k = rows.shape[1];
  for (int64_t begin = 0; begin < num_k; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, num_k);
    for (int64_t row = first; row < last; ++row) {
      const Source* source = rows.as<const Source>() + (row - row_start) * rows.strides[0];
      Stored* column = panel + stored_position(row % kPanelColumns, panel);
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
