// Number formats of simt.h in integer arithmetic. Included by simt_host.h.
#pragma once

namespace engine::cuda {

inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// A positive finite number in steps of 2^exponent, rounded to nearest, ties to even.
inline float round_to_step(float x, int exponent) {
  return std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
}

// The bits of |x| in a format with `mantissa` bits and exponents from `smallest`, where it is at most its
// largest.
inline uint32_t narrow(float magnitude, int mantissa, int smallest) {
  if (magnitude == 0) return 0;
  int exponent;
  std::frexp(magnitude, &exponent);
  --exponent;
  const int step = (exponent < smallest ? smallest : exponent) - mantissa;
  // A sum that carries into the next exponent is what follows in the bits, too.
  const uint32_t steps = static_cast<uint32_t>(std::ldexp(round_to_step(magnitude, step), -step));
  return exponent < smallest ? steps : steps + (static_cast<uint32_t>(exponent - smallest) << mantissa);
}

inline float widen(uint32_t bits, int mantissa, int smallest) {
  const uint32_t exponent = bits >> mantissa, fraction = bits & ((1u << mantissa) - 1);
  if (exponent == 0) return std::ldexp(static_cast<float>(fraction), smallest - mantissa);
  return std::ldexp(static_cast<float>(fraction | 1u << mantissa),
                    smallest - mantissa + static_cast<int>(exponent) - 1);
}

inline Float16 to_float16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  return {static_cast<uint16_t>(sign | narrow(magnitude, 10, -14))};
}
inline float to_float(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const float wide = magnitude > 0x7c00    ? std::nanf("")
                     : magnitude == 0x7c00 ? INFINITY
                                           : widen(magnitude, 10, -14);
  return x.bits >> 15 ? -wide : wide;
}

inline Float8 to_float8(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return {0x7f};
  const float magnitude = std::fabs(x);
  return {static_cast<uint8_t>(sign | (magnitude >= 448.0f ? 0x7e : narrow(magnitude, 3, -6)))};
}

inline float to_float(Float8 x) {
  const uint32_t magnitude = x.bits & 0x7fu;
  const float wide = magnitude == 0x7f ? std::nanf("") : widen(magnitude, 3, -6);
  return x.bits >> 7 ? -wide : wide;
}

template <typename T>
uint32_t pack_pair(float low, float high);
template <>
inline uint32_t pack_pair<BFloat16>(float low, float high) {
  return to_bfloat16(low).bits | static_cast<uint32_t>(to_bfloat16(high).bits) << 16;
}
template <>
inline uint32_t pack_pair<Float16>(float low, float high) {
  return to_float16(low).bits | static_cast<uint32_t>(to_float16(high).bits) << 16;
}

template <typename T>
float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  return pack_pair<BFloat16>(half_of<BFloat16>(a, 0) * half_of<BFloat16>(b, 0),
                             half_of<BFloat16>(a, 1) * half_of<BFloat16>(b, 1));
}

}  // namespace engine::cuda
