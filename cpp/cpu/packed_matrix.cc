#include "cpu/packed_matrix.h"

#include <algorithm>
#include <string>

#include "cpu/float_formats.h"
#include "cpu/quantize_weights.h"
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

// What the panels of the format take.
int64_t num_bytes(int64_t out_features, int64_t in_features, WeightFormat format, const PanelLayout& layout) {
  const int64_t num_panels = (out_features + kPanelColumns - 1) / kPanelColumns;
  switch (format) {
    case WeightFormat::kFloat32: return num_panels * kPanelColumns * in_features * 4;
    case WeightFormat::kBFloat16:
    case WeightFormat::kBFloat16Dot: return num_panels * kPanelColumns * in_features * 2;
    default: return num_panels * panel_bytes(layout, in_features);
  }
}

int64_t checked_group_len(WeightFormat format, int64_t group_len) {
  if (!is_quantized(format)) return 0;
  if (group_len == 0) return format == WeightFormat::kInt8 ? 128 : 32;
  if (group_len == 32 || group_len == 128) return group_len;
  throw Error(ErrorCode::kInvalidArgument, "group_len: expected 32 or 128, got " + std::to_string(group_len));
}

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

PackedMatrix::PackedMatrix(int64_t out_features, int64_t in_features, WeightFormat format, int64_t group_len)
    : out_features_(checked_features(out_features, "out_features")),
      in_features_(checked_features(in_features, "in_features")),
      format_(format),
      layout_(panel_layout(format, checked_group_len(format, group_len))),
      buffer_(std::make_unique<LargeBuffer>(cpu::num_bytes(out_features, in_features, format, layout_),
                                            LargeBuffer::Place::kBesideOthers)),
      is_packed_(static_cast<size_t>(out_features)),
      num_missing_(out_features) {}

void PackedMatrix::check_rows(int64_t row_start, const TensorView& weight) const {
  Dim n("n"), K("K", in_features_);
  expect(weight, "weight", {DType::kFloat32, DType::kBFloat16, DType::kFloat16}, {n, K}, Layout::kRows);
  check_row_start(row_start, n);
}

void PackedMatrix::check_row_start(int64_t row_start, int64_t num_rows) const {
  if (row_start < 0 || row_start > out_features_ - num_rows) {
    throw Error(ErrorCode::kInvalidArgument, "row_start: " + std::to_string(num_rows) + " rows from " +
                                                 std::to_string(row_start) + " on, but the matrix has " +
                                                 std::to_string(out_features_));
  }
}

void PackedMatrix::expect_writable() const {
  if (buffer_->is_writable()) return;
  throw Error(ErrorCode::kInvalidArgument, "weight: it lies in a file, and cannot be packed again");
}

void PackedMatrix::balance_columns(ThreadPool& pool, const std::vector<TensorView>& parts) {
  if (!is_quantized(format_)) {
    throw Error(ErrorCode::kInvalidArgument, "dtype: only quantised weights have column scales");
  }
  std::vector<double> magnitudes(static_cast<size_t>(in_features_));
  for (const TensorView& part : parts) {
    check_rows(0, part);
    add_column_magnitudes(pool, part, magnitudes);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (num_missing_ < out_features_) {
    throw Error(ErrorCode::kInvalidArgument, "weight: columns are balanced before rows are packed");
  }
  column_scales_ = cpu::column_scales(magnitudes);
}

void PackedMatrix::pack_rows(ThreadPool& pool, int64_t row_start, const TensorView& weight) {
  check_rows(row_start, weight);
  expect_writable();
  if (format_ == WeightFormat::kInt4Affine) {
    throw Error(ErrorCode::kInvalidArgument, "dtype: int4_affine weights are packed from their codes");
  }
  switch (format_) {
    case WeightFormat::kBFloat16:
    case WeightFormat::kBFloat16Dot: pack_any<Bf16>(pool, weight, row_start, buffer_->data()); break;
    case WeightFormat::kFloat32: pack_any<float>(pool, weight, row_start, buffer_->data()); break;
    default:
      quantize_rows(pool, weight, row_start, format_, layout_, column_scales(),
                    static_cast<uint8_t*>(buffer_->data()));
  }
  mark_packed(row_start, weight.shape[0]);
}

void PackedMatrix::pack_codes(ThreadPool& pool, int64_t row_start, const TensorView& codes,
                              const TensorView& scales, const TensorView* offsets) {
  const bool is_affine = format_ == WeightFormat::kInt4Affine;
  if (!is_quantized(format_)) {
    throw Error(ErrorCode::kInvalidArgument, "dtype: only quantised weights have codes");
  }
  const int64_t num_groups = (in_features_ + layout_.group_len - 1) / layout_.group_len;
  Dim n("n"), K("K", in_features_), G("G", num_groups);
  expect(codes, "codes", {DType::kUInt8}, {n, K}, Layout::kRows);
  const DType scale_dtype = format_ == WeightFormat::kInt4 ? DType::kFloat16 : DType::kFloat32;
  expect(scales, "scales", {scale_dtype}, {n, G}, Layout::kRows);
  if (is_affine != (offsets != nullptr)) {
    throw Error(ErrorCode::kInvalidArgument, "offsets: int4_affine weights have them, and no others");
  }
  if (is_affine) expect(*offsets, "offsets", {DType::kFloat32}, {n, G}, Layout::kRows);
  check_row_start(row_start, n);
  expect_writable();
  store_codes(pool, {codes, scales, offsets}, row_start, format_, layout_,
              static_cast<uint8_t*>(buffer_->data()));
  mark_packed(row_start, n);
}

void PackedMatrix::set_column_order(std::vector<int32_t> order) {
  std::vector<bool> is_seen(static_cast<size_t>(in_features_));
  const bool fits = static_cast<int64_t>(order.size()) == in_features_ && is_quantized(format_);
  for (size_t k = 0; fits && k < order.size(); ++k) {
    if (order[k] >= 0 && order[k] < in_features_) is_seen[static_cast<size_t>(order[k])] = true;
  }
  if (!order.empty() && std::find(is_seen.begin(), is_seen.end(), false) != is_seen.end()) {
    throw Error(ErrorCode::kInvalidArgument,
                "column_order: expected a permutation of the K=" + std::to_string(in_features_) +
                    " columns of a quantised matrix");
  }
  column_order_ = std::move(order);
}

void PackedMatrix::mark_packed(int64_t row_start, int64_t num_rows) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int64_t row = row_start; row < row_start + num_rows; ++row) {
    num_missing_ -= is_packed_[static_cast<size_t>(row)] ? 0 : 1;
    is_packed_[static_cast<size_t>(row)] = true;
  }
}

bool PackedMatrix::is_complete() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_missing_ == 0;
}

}  // namespace engine::cpu
