// Single numbers to what tensors store, bfloat16 or float32. Include only from files in this folder; see vec.h.
#pragma once

#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {

// To nearest, ties to even; NaN stays NaN, which the bare rounding would turn into zero.
ENGINE_INLINE void convert(float x, uint16_t& to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  to = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}
ENGINE_INLINE void convert(float x, float& to) { to = x; }

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
