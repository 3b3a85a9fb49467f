// Vec16 as one 512-bit register. See vec.h.
#pragma once

#include <immintrin.h>

namespace engine::cpu {
namespace ENGINE_ISA {

struct Vec16 {
  __m512 v;
};

ENGINE_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

ENGINE_INLINE Vec16 zero() { return {_mm512_setzero_ps()}; }
ENGINE_INLINE Vec16 set1(float x) { return {_mm512_set1_ps(x)}; }
ENGINE_INLINE Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
// Lanes from n (0 to 16) on are zero, and their memory is not touched.
ENGINE_INLINE Vec16 load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
ENGINE_INLINE void store(float* p, Vec16 a) { _mm512_storeu_ps(p, a.v); }
ENGINE_INLINE void store_first(float* p, Vec16 a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }

ENGINE_INLINE Vec16 add(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
ENGINE_INLINE Vec16 sub(Vec16 a, Vec16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
ENGINE_INLINE Vec16 mul(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
ENGINE_INLINE Vec16 div(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
ENGINE_INLINE Vec16 min(Vec16 a, Vec16 b) { return {_mm512_min_ps(a.v, b.v)}; }
ENGINE_INLINE Vec16 max(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }
ENGINE_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// Lane i is 0 where a[i] < b[i], else x[i].
ENGINE_INLINE Vec16 zero_where_less(Vec16 x, Vec16 a, Vec16 b) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)};
}

// Bit i tells whether a[i] > b[i].
ENGINE_INLINE uint32_t where_greater(Vec16 a, Vec16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }

// x * 2^n, where the low mantissa bits of `shifted` hold n.
ENGINE_INLINE Vec16 scale_by_pow2(Vec16 x, Vec16 shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), n))};
}

ENGINE_INLINE Vec16 load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

// To what bfloat16 holds: the nearest, ties to even; NaN stays NaN.
ENGINE_INLINE Vec16 round_to_bf16(Vec16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff));
  const __mmask16 is_number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  const __m512i rounded = _mm512_mask_add_epi32(bits, is_number, bits, half);
  return {_mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}

ENGINE_INLINE Vec16 load_int8(const int8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))};
}

ENGINE_INLINE Vec16 load_fp16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// p holds 16 pairs: `low` gets the even elements, `high` the odd ones.
ENGINE_INLINE void load_bf16_pairs(const uint16_t* p, Vec16& low, Vec16& high) {
  const __m512i pairs = _mm512_loadu_si512(p);
  low.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  high.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

ENGINE_INLINE float reduce_add(Vec16 a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

ENGINE_INLINE float reduce_max(Vec16 a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
