#include "cpu/kernels/convert.h"
#include "cpu/kernels/table.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

// Below this, 127 over the largest magnitude could overflow; such a head is taken for zero.
constexpr float kTiny = 1e-35f;

// D numbers as codes times the scale that is returned, which follows from these numbers alone. Where one of
// them is not finite, the scale is NaN.
ENGINE_INLINE float quantize(const float* x, int64_t D, int64_t stride, int8_t* codes) {
  float largest = 0.0f;
  bool is_finite = true;
  for (int64_t d = 0; d < D; ++d) {
    const float magnitude = __builtin_fabsf(x[d]);
    largest = magnitude > largest ? magnitude : largest;
    is_finite &= magnitude <= __FLT_MAX__;
  }
  const float factor = largest < kTiny ? 0.0f : 127.0f / largest;
  for (int64_t d = 0; d < D; ++d) {
    // Adding 1.5 * 2^23 rounds to the nearest integer, which is then in the low bits.
    const float shifted = x[d] * factor + 12582912.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof(bits));
    codes[d * stride] = static_cast<int8_t>(bits & 0xffu);
  }
  return is_finite ? (largest < kTiny ? 0.0f : largest / 127.0f) : __builtin_nanf("");
}

ENGINE_INLINE void append_quantized(const AppendKvArgs& args, int64_t begin, int64_t end) {
  const int64_t D = args.D, S = args.S;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t block_id = args.slot_ids[t] / S;
    const int64_t offset = args.slot_ids[t] % S;
    int8_t* keys = static_cast<int8_t*>(args.k_cache) + block_id * args.k_block_stride + offset;
    int8_t* values = static_cast<int8_t*>(args.v_cache) + block_id * args.v_block_stride + offset * D;
    float* scales = args.kv_scales + block_id * args.scales_block_stride + offset;
    for (int64_t g = 0; g < args.G; ++g) {
      scales[2 * g * S] = quantize(args.k + t * args.k_stride + g * D, D, S, keys + g * D * S);
      scales[(2 * g + 1) * S] = quantize(args.v + t * args.v_stride + g * D, D, 1, values + g * S * D);
    }
  }
}

// Keys are stored with the tokens of a block side by side, so that attention computes the scores
// of sixteen tokens in the lanes of one vector.
template <typename Element>
ENGINE_INLINE void append(const AppendKvArgs& args, int64_t begin, int64_t end) {
  const int64_t D = args.D, S = args.S;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t block_id = args.slot_ids[t] / S;
    const int64_t offset = args.slot_ids[t] % S;
    const float* k = args.k + t * args.k_stride;
    const float* v = args.v + t * args.v_stride;
    Element* keys = static_cast<Element*>(args.k_cache) + block_id * args.k_block_stride + offset;
    Element* values = static_cast<Element*>(args.v_cache) + block_id * args.v_block_stride + offset * D;
    for (int64_t g = 0; g < args.G; ++g, k += D, v += D, keys += D * S, values += S * D) {
      for (int64_t d = 0; d < D; ++d) convert(k[d], keys[d * S]);
      for (int64_t d = 0; d < D; ++d) convert(v[d], values[d]);
    }
  }
}

}  // namespace

void append_kv(const AppendKvArgs& args, int64_t begin, int64_t end) {
  switch (args.format) {
    case CacheFormat::kFloat32: return append<float>(args, begin, end);
    case CacheFormat::kBFloat16: return append<uint16_t>(args, begin, end);
    case CacheFormat::kInt8: return append_quantized(args, begin, end);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
