#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

// A token's weights are one column of its panel: one element of every k-row.
ENGINE_INLINE void read_float32(const EmbeddingArgs& args, int64_t panel, int64_t column, float* out) {
  const float* weight =
      static_cast<const float*>(args.weight) + panel * kPanelColumns * args.in_features + column;
  for (int64_t k = 0; k < args.in_features; ++k) out[k] = weight[k * kPanelColumns];
}

ENGINE_INLINE void read_bfloat16(const EmbeddingArgs& args, int64_t panel, int64_t column, float* out) {
  const uint16_t* weight = static_cast<const uint16_t*>(args.weight) +
                           panel * kPanelColumns * args.in_features + column % 16 * 2 + column / 16;
  for (int64_t k = 0; k < args.in_features; ++k) {
    const uint32_t bits = static_cast<uint32_t>(weight[k * kPanelColumns]) << 16;
    __builtin_memcpy(out + k, &bits, sizeof(bits));
  }
}

ENGINE_INLINE void read_quantized(const EmbeddingArgs& args, int64_t panel, int64_t column, float* out) {
  const PanelLayout layout = panel_layout(args.format, args.group_len);
  const uint8_t* group =
      static_cast<const uint8_t*>(args.weight) + panel * panel_bytes(layout, args.in_features);
  const bool is_int8 = args.format == WeightFormat::kInt8;
  const bool is_affine = args.format == WeightFormat::kInt4Affine;
  for (int64_t begin = 0; begin < args.in_features; begin += args.group_len) {
    const int64_t left = args.in_features - begin;
    const int64_t count = left < args.group_len ? left : args.group_len;
    float scales[16];
    float offset = 0;
    if (args.format == WeightFormat::kInt4) {
      store(scales, load_fp16(reinterpret_cast<const uint16_t*>(group) + column / 16 * 16));
      scales[0] = scales[column % 16];
    } else {
      __builtin_memcpy(scales, group + column * 4, sizeof(float));
      if (is_affine) __builtin_memcpy(&offset, group + (kPanelColumns + column) * 4, sizeof(float));
    }
    const uint8_t* step = group + layout.scale_bytes + column * 4;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* four = step + i / kWeightStep * layout.step_bytes;
      const bool is_second = i % kWeightStep >= 4;
      const int code = is_int8 ? four[(is_second ? 128 : 0) + i % 4] : four[i % 4] >> (is_second ? 4 : 0) & 15;
      const float weight = is_affine ? static_cast<float>(code) * scales[0] + offset
                                     : static_cast<float>(code - zero_code(args.format)) * scales[0];
      const int64_t k = args.column_order == nullptr ? begin + i : args.column_order[begin + i];
      out[k] = args.column_scales == nullptr ? weight : weight * args.column_scales[k];
    }
    group += panel_bytes(layout, args.group_len);
  }
}

}  // namespace

void embedding(const EmbeddingArgs& args, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t panel = args.token_ids[token] / kPanelColumns;
    const int64_t column = args.token_ids[token] % kPanelColumns;
    float* out = args.out + token * args.out_stride;
    switch (args.format) {
      case WeightFormat::kFloat32: read_float32(args, panel, column, out); break;
      case WeightFormat::kBFloat16:
      case WeightFormat::kBFloat16Dot: read_bfloat16(args, panel, column, out); break;
      default: read_quantized(args, panel, column, out);
    }
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
