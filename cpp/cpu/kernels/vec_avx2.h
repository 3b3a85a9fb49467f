// Vec16 as two 256-bit registers. See vec.h.
#pragma once

#include <immintrin.h>

namespace engine::cpu {
namespace ENGINE_ISA {

struct Vec16 {
  __m256 lo, hi;
};

// All ones in the first n (any number) of eight lanes.
ENGINE_INLINE __m256i first_eight(int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes);
}

ENGINE_INLINE Vec16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
ENGINE_INLINE Vec16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ENGINE_INLINE Vec16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
// Lanes from n (0 to 16) on are zero, and their memory is not touched.
ENGINE_INLINE Vec16 load_first(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, first_eight(n)), _mm256_maskload_ps(p + 8, first_eight(n - 8))};
}
ENGINE_INLINE void store(float* p, Vec16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
ENGINE_INLINE void store_first(float* p, Vec16 a, int64_t n) {
  _mm256_maskstore_ps(p, first_eight(n), a.lo);
  _mm256_maskstore_ps(p + 8, first_eight(n - 8), a.hi);
}

ENGINE_INLINE Vec16 add(Vec16 a, Vec16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
ENGINE_INLINE Vec16 sub(Vec16 a, Vec16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
ENGINE_INLINE Vec16 mul(Vec16 a, Vec16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
ENGINE_INLINE Vec16 div(Vec16 a, Vec16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
ENGINE_INLINE Vec16 min(Vec16 a, Vec16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
ENGINE_INLINE Vec16 max(Vec16 a, Vec16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
ENGINE_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

// Lane i is 0 where a[i] < b[i], else x[i].
ENGINE_INLINE Vec16 zero_where_less(Vec16 x, Vec16 a, Vec16 b) {
  return {_mm256_and_ps(x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ)),
          _mm256_and_ps(x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ))};
}

ENGINE_INLINE __m256 scale_eight(__m256 x, __m256 shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n));
}
// Bit i tells whether a[i] > b[i].
ENGINE_INLINE uint32_t where_greater(Vec16 a, Vec16 b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ));
  return static_cast<uint32_t>(lo | hi << 8);
}

// x * 2^n, where the low mantissa bits of `shifted` hold n.
ENGINE_INLINE Vec16 scale_by_pow2(Vec16 x, Vec16 shifted) {
  return {scale_eight(x.lo, shifted.lo), scale_eight(x.hi, shifted.hi)};
}

ENGINE_INLINE __m256 load_eight_bf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
ENGINE_INLINE Vec16 load_bf16(const uint16_t* p) { return {load_eight_bf16(p), load_eight_bf16(p + 8)}; }

ENGINE_INLINE __m256 round_eight_to_bf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i is_number = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_ORD_Q));
  const __m256i half = _mm256_and_si256(_mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)), is_number);
  const __m256i rounded = _mm256_add_epi32(bits, half);
  return _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
// To what bfloat16 holds: the nearest, ties to even; NaN stays NaN.
ENGINE_INLINE Vec16 round_to_bf16(Vec16 a) { return {round_eight_to_bf16(a.lo), round_eight_to_bf16(a.hi)}; }

ENGINE_INLINE __m256 load_eight_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
ENGINE_INLINE Vec16 load_int8(const int8_t* p) { return {load_eight_int8(p), load_eight_int8(p + 8)}; }

ENGINE_INLINE Vec16 load_fp16(const uint16_t* p) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

// p holds 16 pairs: `low` gets the even elements, `high` the odd ones.
ENGINE_INLINE void load_bf16_pairs(const uint16_t* p, Vec16& low, Vec16& high) {
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  const __m256i upper_half = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  low = {_mm256_castsi256_ps(_mm256_slli_epi32(first, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(second, 16))};
  high = {_mm256_castsi256_ps(_mm256_and_si256(first, upper_half)),
          _mm256_castsi256_ps(_mm256_and_si256(second, upper_half))};
}

ENGINE_INLINE float reduce_add(Vec16 a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

ENGINE_INLINE float reduce_max(Vec16 a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
