#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

// To nearest, ties to even; NaN stays NaN, which the bare rounding would turn into zero.
ENGINE_INLINE void convert(float x, uint16_t& to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  to = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}
ENGINE_INLINE void convert(float x, float& to) { to = x; }

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
  if (args.cache_is_bf16) {
    append<uint16_t>(args, begin, end);
  } else {
    append<float>(args, begin, end);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
