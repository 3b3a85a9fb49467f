// What attention multiplies: how keys and values are read, and how queries and weights are kept for that.
// Include only from files in this folder; see vec.h.
#pragma once

#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {

// Elements of a cache are float, uint16_t (bfloat16), int8_t, or bfloat16 that meets factors of bfloat16, too,
// multiplied by fma or by vdpbf16ps.
struct RoundedBf16 {
  uint16_t bits;
};

// Whether keys and values are codes, to be multiplied with their token's scale.
template <typename Element>
constexpr bool kIsQuantized = sizeof(Element) == 1;
// Whether factors are rounded, and two rows of elements are one step.
template <typename Element>
constexpr bool kIsRounded = false;
template <>
constexpr bool kIsRounded<RoundedBf16> = true;
// Whether two factors share a float's place, the first of them in its lower half.
template <typename Element>
constexpr bool kIsPaired = false;

template <typename Element>
constexpr int kRowsPerStep = kIsRounded<Element> ? 2 : 1;

ENGINE_INLINE Vec16 load_row(const float* p) { return load(p); }
ENGINE_INLINE Vec16 load_row(const uint16_t* p) { return load_bf16(p); }
ENGINE_INLINE Vec16 load_row(const int8_t* p) { return load_int8(p); }
ENGINE_INLINE Vec16 load_row(const RoundedBf16* p) { return load_bf16(&p->bits); }

#if ENGINE_ISA_avx512

// Machines have its two instructions, or have them not, whatever else they have, so that they are written down
// rather than compiled for.
struct DotBf16 {
  uint16_t bits;

  ENGINE_INLINE __m256i load_bits(const DotBf16* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  // Of each column the element of both rows.
  ENGINE_INLINE Vec16 load_pairs(const DotBf16* first, const DotBf16* second) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                        37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                        11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    return {_mm512_castsi512_ps(_mm512_permutex2var_epi16(_mm512_castsi256_si512(load_bits(first)),
                                                          _mm512_load_si512(kOrder),
                                                          _mm512_castsi256_si512(load_bits(second))))};
  }
  // The same with zeros for the other row.
  ENGINE_INLINE Vec16 load_alone(const DotBf16* p, bool is_second) {
    if (is_second) return load_bf16(&p->bits);
    return {_mm512_castsi512_ps(_mm512_cvtepu16_epi32(load_bits(p)))};
  }
  ENGINE_INLINE Vec16 add_products(Vec16 factors, Vec16 x, Vec16 sum) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(x.v), "v"(factors.v));
    return sum;
  }
  ENGINE_INLINE void store_factors(float* p, Vec16 x) {
    __m256i rounded;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(x.v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
  }
};
template <>
constexpr bool kIsRounded<DotBf16> = true;
template <>
constexpr bool kIsPaired<DotBf16> = true;

#endif

// Keeps 16 factors, queries or weights, as those of the rows from `at` on, a multiple of 16. They may be kept
// in ascending order where they are read from.
template <typename Element>
ENGINE_INLINE void store_factors(float* factors, int64_t at, Vec16 x) {
  if constexpr (kIsPaired<Element>) {
    Element::store_factors(factors + at / 2, x);
  } else if constexpr (kIsRounded<Element>) {
    store(factors + at, round_to_bf16(x));
  } else {
    store(factors + at, x);
  }
}

// Adds to each of R rows of sums its factor, factors[r][at], times C vectors that all share.
template <typename Element, int R, int C, class Factors>
ENGINE_INLINE void add_products(Factors factors, int64_t at, const Vec16 (&x)[C], Vec16 (&sum)[R][C]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Vec16 factor = set1(factors[r][at]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      if constexpr (kIsPaired<Element>) {
        sum[r][c] = Element::add_products(factor, x[c], sum[r][c]);
      } else {
        sum[r][c] = fma(factor, x[c], sum[r][c]);
      }
    }
  }
}

// The products of one row of keys or values, each C vectors from rows[c] on; `at` is its number.
template <typename Element, int R, int C, class Factors>
ENGINE_INLINE void add_row(Factors factors, int64_t at, const Element* const (&rows)[C], Vec16 (&sum)[R][C]) {
  Vec16 x[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    if constexpr (kIsPaired<Element>) {
      x[c] = Element::load_alone(rows[c], at % 2 == 1);
    } else {
      x[c] = load_row(rows[c]);
    }
  }
  add_products<Element>(factors, kIsPaired<Element> ? at / 2 : at, x, sum);
}

// Those of kRowsPerStep rows from number `at` on, a multiple of that; `stride` lies between two.
template <typename Element, int R, int C, class Factors>
ENGINE_INLINE void add_step(Factors factors, int64_t at, const Element* const (&rows)[C], int64_t stride,
                            Vec16 (&sum)[R][C]) {
  if constexpr (kIsPaired<Element>) {
    Vec16 x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) x[c] = Element::load_pairs(rows[c], rows[c] + stride);
    add_products<Element>(factors, at / 2, x, sum);
  } else if constexpr (kIsRounded<Element>) {
    const Element* second[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) second[c] = rows[c] + stride;
    add_row(factors, at + 1, second, sum);
    add_row(factors, at, rows, sum);
  } else {
    add_row(factors, at, rows, sum);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
