// Products of bytes: sixteen int32 sums, each of four unsigned weights times four signed inputs.
//
// Sums of int32 are exact, so every instruction set gives the same bits, in any order. Weights
// of sixteen columns come as 64 bytes, four k of each column side by side.
//
// Include only from files in this folder, after vec.h; see there.
#pragma once

#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {

#if ENGINE_ISA_avx512

struct Sums16 {
  __m512i v;
};
ENGINE_INLINE Sums16 all_sums(int32_t x) { return {_mm512_set1_epi32(x)}; }
ENGINE_INLINE Vec16 to_float(Sums16 a) { return {_mm512_cvtepi32_ps(a.v)}; }

// Lanes hold whole numbers from -128 to 127.
ENGINE_INLINE void store_bytes(int8_t* p, Vec16 a) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

struct Bytes64 {
  __m512i v;
};
ENGINE_INLINE Bytes64 load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
ENGINE_INLINE bool is_zero(Bytes64 a) { return _mm512_test_epi64_mask(a.v, a.v) == 0; }
ENGINE_INLINE Bytes64 low_nibbles(Bytes64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
ENGINE_INLINE Bytes64 high_nibbles(Bytes64 a) { return low_nibbles({_mm512_srli_epi16(a.v, 4)}); }
// Byte `which` (0 to 3) of each column.
ENGINE_INLINE Sums16 byte_of(Bytes64 a, int which) {
  const __m512i shifted = _mm512_srl_epi32(a.v, _mm_cvtsi32_si128(8 * which));
  return {_mm512_and_si512(shifted, _mm512_set1_epi32(255))};
}

#elif ENGINE_ISA_avx2

struct Sums16 {
  __m256i lo, hi;
};
ENGINE_INLINE Sums16 all_sums(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
ENGINE_INLINE Vec16 to_float(Sums16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

// Lanes hold whole numbers from -128 to 127.
ENGINE_INLINE void store_bytes(int8_t* p, Vec16 a) {
  // Packing works in halves of 128 bits: the order 0 2 1 3 of the quarters is undone at the end.
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

struct Bytes64 {
  __m256i lo, hi;
};
ENGINE_INLINE Bytes64 load_bytes(const uint8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
ENGINE_INLINE bool is_zero(Bytes64 a) {
  const __m256i any = _mm256_or_si256(a.lo, a.hi);
  return _mm256_testz_si256(any, any);
}
ENGINE_INLINE Bytes64 low_nibbles(Bytes64 a) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
ENGINE_INLINE Bytes64 high_nibbles(Bytes64 a) {
  return low_nibbles({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)});
}
ENGINE_INLINE Sums16 byte_of(Bytes64 a, int which) {
  const __m128i count = _mm_cvtsi32_si128(8 * which);
  const __m256i mask = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srl_epi32(a.lo, count), mask),
          _mm256_and_si256(_mm256_srl_epi32(a.hi, count), mask)};
}

#else

struct Sums16 {
  Int16Lanes v;
};
ENGINE_INLINE Sums16 all_sums(int32_t x) { return {Int16Lanes{} + x}; }
ENGINE_INLINE Vec16 to_float(Sums16 a) { return {__builtin_convertvector(a.v, Float16Lanes)}; }

// Lanes hold whole numbers from -128 to 127.
ENGINE_INLINE void store_bytes(int8_t* p, Vec16 a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

typedef uint8_t Bytes64Lanes __attribute__((vector_size(64)));
struct Bytes64 {
  Bytes64Lanes v;
};
ENGINE_INLINE Bytes64 load_bytes(const uint8_t* p) {
  Bytes64 a;
  __builtin_memcpy(&a.v, p, sizeof(a.v));
  return a;
}
ENGINE_INLINE bool is_zero(Bytes64 a) {
  uint64_t words[8], any = 0;
  __builtin_memcpy(words, &a.v, sizeof(words));
  for (int i = 0; i < 8; ++i) any |= words[i];
  return any == 0;
}
ENGINE_INLINE Bytes64 low_nibbles(Bytes64 a) { return {a.v & 15}; }
ENGINE_INLINE Bytes64 high_nibbles(Bytes64 a) { return {a.v >> 4}; }
ENGINE_INLINE Sums16 byte_of(Bytes64 a, int which) {
  Int16Lanes lanes;
  __builtin_memcpy(&lanes, &a.v, sizeof(lanes));
  return {(lanes >> (8 * which)) & 255};
}

#endif

// How the dot products want their operands: as they are for the instruction made for them, and as even
// and odd bytes, widened to 16 bits, for the multiplication of pairs that every other set has.

#if defined(__AVX512VNNI__)

using Weights64 = Bytes64;
ENGINE_INLINE Weights64 as_weights(Bytes64 a) { return a; }
using Inputs4 = __m512i;
ENGINE_INLINE Inputs4 load_inputs(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return _mm512_set1_epi32(four);
}
ENGINE_INLINE Sums16 dot(Sums16 sums, const Weights64& weights, Inputs4 inputs) {
  // _mm512_dpbusd_epi32, but GCC 12 keeps copying the sums from register to register around that.
  asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(weights.v), "v"(inputs));
  return sums;
}

#elif ENGINE_ISA_avx512

struct Weights64 {
  __m512i even, odd;
};
ENGINE_INLINE Weights64 as_weights(Bytes64 a) {
  return {_mm512_and_si512(a.v, _mm512_set1_epi16(255)), _mm512_srli_epi16(a.v, 8)};
}
struct Inputs4 {
  __m512i even, odd;
};
ENGINE_INLINE Inputs4 load_inputs(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  const __m512i x = _mm512_set1_epi32(four);
  return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
}
ENGINE_INLINE Sums16 dot(Sums16 sums, const Weights64& weights, const Inputs4& inputs) {
  const __m512i even = _mm512_add_epi32(sums.v, _mm512_madd_epi16(weights.even, inputs.even));
  return {_mm512_add_epi32(even, _mm512_madd_epi16(weights.odd, inputs.odd))};
}

#elif ENGINE_ISA_avx2

struct Weights64 {
  __m256i even_lo, even_hi, odd_lo, odd_hi;
};
ENGINE_INLINE Weights64 as_weights(Bytes64 a) {
  const __m256i mask = _mm256_set1_epi16(255);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask), _mm256_srli_epi16(a.lo, 8),
          _mm256_srli_epi16(a.hi, 8)};
}
struct Inputs4 {
  __m256i even, odd;
};
ENGINE_INLINE Inputs4 load_inputs(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  const __m256i x = _mm256_set1_epi32(four);
  return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
ENGINE_INLINE __m256i dot_eight(__m256i sums, __m256i even, __m256i odd, const Inputs4& inputs) {
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, inputs.even));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(odd, inputs.odd));
}
ENGINE_INLINE Sums16 dot(Sums16 sums, const Weights64& weights, const Inputs4& inputs) {
  return {dot_eight(sums.lo, weights.even_lo, weights.odd_lo, inputs),
          dot_eight(sums.hi, weights.even_hi, weights.odd_hi, inputs)};
}

#else

using Weights64 = Bytes64;
ENGINE_INLINE Weights64 as_weights(Bytes64 a) { return a; }
struct Inputs4 {
  int32_t x[4];
};
ENGINE_INLINE Inputs4 load_inputs(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
ENGINE_INLINE Sums16 dot(Sums16 sums, const Weights64& weights, const Inputs4& inputs) {
  for (int i = 0; i < 4; ++i) sums.v += byte_of(weights, i).v * inputs.x[i];
  return sums;
}

#endif

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
