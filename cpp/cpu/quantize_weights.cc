#include "cpu/quantize_weights.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/float_formats.h"

namespace engine::cpu {
namespace {

constexpr int64_t kMaxGroup = kActivationGroup;
constexpr int64_t kColumnsPerItem = 64;
constexpr float kRound = 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
constexpr float kLargestHalf = 65504.0f;
// Columns this many times larger than the median are scaled down.
constexpr double kLargeColumn = 4;

template <typename Source>
void load(const Source* source, const float* column_scales, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(source[i]);
  if (column_scales == nullptr) return;
  for (int64_t i = 0; i < count; ++i) values[i] /= column_scales[i];
}

// The bits of magnitudes order as integers, which compilers turn into vector instructions.
float largest_magnitude(const float* values, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<int32_t>(bits_of_float(values[i]) & 0x7fffffffu));
  }
  return float_from_bits(static_cast<uint32_t>(largest));
}

void round_to_codes(const float* values, int64_t count, float factor, int32_t zero, int32_t most,
                    uint8_t* codes) {
  int32_t rounded[kMaxGroup];
  for (int64_t i = 0; i < count; ++i) {
    rounded[i] = static_cast<int32_t>(bits_of_float(values[i] * factor + kRound)) - 0x4b400000 + zero;
  }
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(std::clamp(rounded[i], 0, most));
}

float inverse(float scale) {
  const float factor = 1.0f / scale;
  return std::isfinite(factor) ? factor : 0.0f;  // of 0, and of what is next to nothing
}

float quantize_int8(const float* values, int64_t count, uint8_t* codes) {
  const float largest = largest_magnitude(values, count);
  const bool is_finite = std::isfinite(largest);
  const float scale = largest / 127.0f;
  round_to_codes(values, count, is_finite ? inverse(scale) : 0.0f, 128, 255, codes);
  return is_finite ? scale : std::numeric_limits<float>::quiet_NaN();
}

Fp16 quantize_int4(const float* values, int64_t count, uint8_t* codes) {
  const float largest = largest_magnitude(values, count);
  const bool is_finite = std::isfinite(largest);
  const bool is_positive = std::find(values, values + count, largest) != values + count;
  const float wanted =
      is_finite ? std::min(largest / 8, kLargestHalf) : std::numeric_limits<float>::quiet_NaN();
  Fp16 scale;
  convert(is_positive ? -wanted : wanted, scale);
  round_to_codes(values, count, is_finite ? inverse(to_float(scale)) : 0.0f, 8, 15, codes);
  return scale;
}

// Writes one column's scale and codes of one group.
void store_int8(const PanelLayout& layout, float scale, const uint8_t* codes, int64_t count, int64_t column,
                uint8_t* group) {
  std::memcpy(group + column * 4, &scale, sizeof(scale));
  uint8_t* step = group + layout.scale_bytes + column * 4;
  for (int64_t k = 0; k < count; k += kWeightStep, step += layout.step_bytes) {
    std::memcpy(step, codes + k, 4);
    std::memcpy(step + 128, codes + k + 4, 4);
  }
}

void store_nibbles(const PanelLayout& layout, const uint8_t* codes, int64_t count, int64_t column,
                   uint8_t* group) {
  uint8_t* step = group + layout.scale_bytes + column * 4;
  for (int64_t k = 0; k < count; k += kWeightStep, step += layout.step_bytes) {
    for (int64_t i = 0; i < 4; ++i) step[i] = static_cast<uint8_t>(codes[k + i] | codes[k + 4 + i] << 4);
  }
}

void store_int4(const PanelLayout& layout, Fp16 scale, const uint8_t* codes, int64_t count, int64_t column,
                uint8_t* group) {
  std::memcpy(group + column * 2, &scale, sizeof(scale));
  store_nibbles(layout, codes, count, column, group);
}

// One row of CodedRows.
void store_row(const CodedRows& rows, int64_t row, WeightFormat format, const PanelLayout& layout,
               int64_t column, uint8_t* panel) {
  const int64_t num_k = rows.codes.shape[1];
  const uint8_t* source = rows.codes.as<const uint8_t>() + row * rows.codes.strides[0];
  const int64_t first_scale = row * rows.scales.strides[0];
  for (int64_t k = 0; k < num_k; k += layout.group_len) {
    const int64_t count = std::min(layout.group_len, num_k - k);
    const int64_t scale = first_scale + k / layout.group_len;
    uint8_t codes[kMaxGroup + kWeightStep] = {};
    const uint8_t most = format == WeightFormat::kInt8 ? 255 : 15;
    for (int64_t i = 0; i < count; ++i) codes[i] = std::min(source[k + i], most);
    switch (format) {
      case WeightFormat::kInt8:
        store_int8(layout, rows.scales.as<const float>()[scale], codes, count, column, panel);
        break;
      case WeightFormat::kInt4:
        store_int4(layout, rows.scales.as<const Fp16>()[scale], codes, count, column, panel);
        break;
      default:
        const int64_t offset = row * rows.offsets->strides[0] + k / layout.group_len;
        std::memcpy(panel + column * 4, rows.scales.as<const float>() + scale, sizeof(float));
        std::memcpy(panel + (kPanelColumns + column) * 4, rows.offsets->as<const float>() + offset,
                    sizeof(float));
        store_nibbles(layout, codes, count, column, panel);
    }
    panel += panel_bytes(layout, layout.group_len);
  }
}

template <typename Source>
void quantize_row(const Source* source, int64_t num_k, WeightFormat format, const PanelLayout& layout,
                  const float* column_scales, int64_t column, uint8_t* panel) {
  for (int64_t k = 0; k < num_k; k += layout.group_len) {
    const int64_t count = std::min(layout.group_len, num_k - k);
    float values[kMaxGroup];
    uint8_t codes[kMaxGroup + kWeightStep];
    load(source + k, column_scales == nullptr ? nullptr : column_scales + k, count, values);
    if (format == WeightFormat::kInt8) {
      const float scale = quantize_int8(values, count, codes);
      std::fill_n(codes + count, kWeightStep, uint8_t{128});
      store_int8(layout, scale, codes, count, column, panel);
    } else {
      const Fp16 scale = quantize_int4(values, count, codes);
      std::fill_n(codes + count, kWeightStep, uint8_t{8});
      store_int4(layout, scale, codes, count, column, panel);
    }
    panel += panel_bytes(layout, layout.group_len);
  }
}

// Calls body(pointer to the first element) with the pointer's type being that of the rows.
template <typename Body>
void with_source(const TensorView& rows, const Body& body) {
  switch (rows.dtype) {
    case DType::kFloat32: return body(rows.as<const float>());
    case DType::kFloat16: return body(rows.as<const Fp16>());
    default: return body(rows.as<const Bf16>());
  }
}

}  // namespace

void quantize_rows(ThreadPool& pool, const TensorView& rows, int64_t row_start, WeightFormat format,
                   const PanelLayout& layout, const float* column_scales, uint8_t* panels) {
  const int64_t num_k = rows.shape[1];
  const int64_t bytes = panel_bytes(layout, num_k);
  with_source(rows, [&](const auto* source) {
    pool.parallel_for(rows.shape[0], kPanelColumns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = row_start + i;
        quantize_row(source + i * rows.strides[0], num_k, format, layout, column_scales, row % kPanelColumns,
                     panels + row / kPanelColumns * bytes);
      }
    });
  });
}

void store_codes(ThreadPool& pool, const CodedRows& rows, int64_t row_start, WeightFormat format,
                 const PanelLayout& layout, uint8_t* panels) {
  const int64_t bytes = panel_bytes(layout, rows.codes.shape[1]);
  pool.parallel_for(rows.codes.shape[0], kPanelColumns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = row_start + i;
      store_row(rows, i, format, layout, row % kPanelColumns, panels + row / kPanelColumns * bytes);
    }
  });
}

void add_column_magnitudes(ThreadPool& pool, const TensorView& rows, std::vector<double>& sums) {
  const int64_t num_k = rows.shape[1];
  const int64_t num_items = (num_k + kColumnsPerItem - 1) / kColumnsPerItem;
  with_source(rows, [&](const auto* source) {
    pool.parallel_for(num_items, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kColumnsPerItem;
      const int64_t count = std::min(end * kColumnsPerItem, num_k) - first;
      for (int64_t row = 0; row < rows.shape[0]; ++row) {
        const auto* weight = source + row * rows.strides[0] + first;
        double* sum = sums.data() + first;
        for (int64_t k = 0; k < count; ++k) sum[k] += static_cast<double>(std::fabs(to_float(weight[k])));
      }
    });
  });
}

std::vector<float> column_scales(const std::vector<double>& magnitudes) {
  std::vector<double> sorted = magnitudes;
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  // Sums that are not numbers have no order; such a matrix is left as it is.
  if (std::any_of(sorted.begin(), sorted.end(), [](double sum) { return !std::isfinite(sum); })) return {};
  std::nth_element(sorted.begin(), middle, sorted.end());
  std::vector<float> scales(magnitudes.size(), 1.0f);
  bool is_needed = false;
  for (size_t k = 0; k < magnitudes.size(); ++k) {
    if (!(*middle > 0) || !(magnitudes[k] > kLargeColumn * *middle)) continue;
    scales[k] = static_cast<float>(std::exp2(std::min(std::round(std::log2(magnitudes[k] / *middle)), 64.0)));
    is_needed = true;
  }
  return is_needed ? scales : std::vector<float>();
}

}  // namespace engine::cpu
