// Vec16 as a compiler vector: the baseline of any machine, and NEON, where fma() is fused.
// See vec.h.
#pragma once

namespace engine::cpu {
namespace ENGINE_ISA {

typedef float Float16Lanes __attribute__((vector_size(64)));
typedef int32_t Int16Lanes __attribute__((vector_size(64)));

struct Vec16 {
  Float16Lanes v;
};

ENGINE_INLINE Vec16 zero() { return {Float16Lanes{}}; }
ENGINE_INLINE Vec16 set1(float x) { return {Float16Lanes{} + x}; }
ENGINE_INLINE Vec16 load(const float* p) {
  Vec16 a;
  __builtin_memcpy(&a.v, p, sizeof(a.v));
  return a;
}
// Lanes from n (0 to 16) on are zero, and their memory is not touched.
ENGINE_INLINE Vec16 load_first(const float* p, int64_t n) {
  Vec16 a = zero();
  for (int64_t i = 0; i < n; ++i) a.v[i] = p[i];
  return a;
}
ENGINE_INLINE void store(float* p, Vec16 a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
ENGINE_INLINE void store_first(float* p, Vec16 a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = a.v[i];
}

ENGINE_INLINE Vec16 add(Vec16 a, Vec16 b) { return {a.v + b.v}; }
ENGINE_INLINE Vec16 sub(Vec16 a, Vec16 b) { return {a.v - b.v}; }
ENGINE_INLINE Vec16 mul(Vec16 a, Vec16 b) { return {a.v * b.v}; }
ENGINE_INLINE Vec16 div(Vec16 a, Vec16 b) { return {a.v / b.v}; }
// The second operand where either is NaN, as the x86 instructions do.
ENGINE_INLINE Vec16 min(Vec16 a, Vec16 b) { return {a.v < b.v ? a.v : b.v}; }
ENGINE_INLINE Vec16 max(Vec16 a, Vec16 b) { return {a.v > b.v ? a.v : b.v}; }
ENGINE_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) {
#if defined(__ARM_FEATURE_FMA)
  Vec16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
#else
  return {a.v * b.v + c.v};
#endif
}

// Lane i is 0 where a[i] < b[i], else x[i].
ENGINE_INLINE Vec16 zero_where_less(Vec16 x, Vec16 a, Vec16 b) { return {a.v < b.v ? Float16Lanes{} : x.v}; }

// Bit i tells whether a[i] > b[i].
ENGINE_INLINE uint32_t where_greater(Vec16 a, Vec16 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
  return bits;
}

// x * 2^n, where the low mantissa bits of `shifted` hold n.
ENGINE_INLINE Vec16 scale_by_pow2(Vec16 x, Vec16 shifted) {
  Int16Lanes bits, n;
  __builtin_memcpy(&bits, &x.v, sizeof(bits));
  __builtin_memcpy(&n, &shifted.v, sizeof(n));
  bits += n << 23;
  __builtin_memcpy(&x.v, &bits, sizeof(bits));
  return x;
}

ENGINE_INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof(f));
  return f;
}
ENGINE_INLINE Vec16 load_bf16(const uint16_t* p) {
  Vec16 a;
  for (int i = 0; i < 16; ++i) a.v[i] = from_bf16(p[i]);
  return a;
}

// To what bfloat16 holds: the nearest, ties to even; NaN stays NaN.
ENGINE_INLINE Vec16 round_to_bf16(Vec16 a) {
  Int16Lanes bits;
  __builtin_memcpy(&bits, &a.v, sizeof(bits));
  const Int16Lanes is_number = a.v == a.v;
  bits = (bits + (is_number & (0x7fff + ((bits >> 16) & 1)))) & static_cast<int32_t>(0xffff0000u);
  __builtin_memcpy(&a.v, &bits, sizeof(bits));
  return a;
}

ENGINE_INLINE Vec16 load_int8(const int8_t* p) {
  Vec16 a;
  for (int i = 0; i < 16; ++i) a.v[i] = p[i];
  return a;
}

ENGINE_INLINE float from_fp16(uint16_t x) {
  // The exponent's bias is made up for by a multiplication, which is exact and serves subnormals too.
  uint32_t bits = (x & 0x7fffu) << 13;
  float f;
  __builtin_memcpy(&f, &bits, sizeof(f));
  f *= 0x1p112f;
  __builtin_memcpy(&bits, &f, sizeof(f));
  bits |= (x & 0x8000u) << 16 | ((x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0);  // infinity and NaN
  __builtin_memcpy(&f, &bits, sizeof(f));
  return f;
}
ENGINE_INLINE Vec16 load_fp16(const uint16_t* p) {
  Vec16 a;
  for (int i = 0; i < 16; ++i) a.v[i] = from_fp16(p[i]);
  return a;
}

// p holds 16 pairs: `low` gets the even elements, `high` the odd ones.
ENGINE_INLINE void load_bf16_pairs(const uint16_t* p, Vec16& low, Vec16& high) {
  for (int i = 0; i < 16; ++i) {
    low.v[i] = from_bf16(p[2 * i]);
    high.v[i] = from_bf16(p[2 * i + 1]);
  }
}

ENGINE_INLINE float reduce_add(Vec16 a) {
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) a.v[i] += a.v[i + step];
  }
  return a.v[0];
}

ENGINE_INLINE float reduce_max(Vec16 a) {
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) a.v[i] = a.v[i] > a.v[i + step] ? a.v[i] : a.v[i + step];
  }
  return a.v[0];
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
