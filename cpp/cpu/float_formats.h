// Element types of weights: what tensors hold, what the kernels read, and the way from one to the other.
#pragma once

#include <cstdint>
#include <cstring>

namespace engine::cpu {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return float_from_bits(uint32_t{value.bits} << 16); }
inline float to_float(Fp16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero or subnormal: an exact multiple of 2^-24
    return float_from_bits(sign | bits_of_float(static_cast<float>(magnitude) * 0x1p-24f));
  }
  const uint32_t exponent_shift = magnitude < 0x7c00u ? (127u - 15u) << 23 : (255u - 31u) << 23;
  return float_from_bits(sign | ((magnitude << 13) + exponent_shift));
}

inline void convert(float value, float& stored) { stored = value; }
// To nearest, ties to even. Rounding could carry a NaN to infinity or to zero; it becomes a quiet NaN.
inline void convert(float value, Bf16& stored) {
  const uint32_t bits = bits_of_float(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  stored.bits = static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
}
inline void convert(float value, Fp16& stored) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 65536 and more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the mantissa
    half = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - ((127u - 15u) << 23)) >> 13;
  }
  stored.bits = static_cast<uint16_t>(sign | half);
}

// Where element `index` of 32 that the kernels load together is stored.
inline int64_t stored_position(int64_t index, const float*) { return index; }
inline int64_t stored_position(int64_t index, const Bf16*) { return index % 16 * 2 + index / 16; }

}  // namespace engine::cpu
