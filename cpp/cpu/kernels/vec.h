// Sixteen float lanes on every instruction set, so that sums have one order everywhere.
//
// Include only from files in this folder. Everything has internal linkage inside a namespace of
// its own per instruction set: an inline function shared between objects that are compiled with
// different flags could be linked in its AVX-512 form into the baseline path.
//
// fma(a, b, c) = a * b + c is fused on every set but the baseline. Reductions add lane i to lane
// i + 8, then i + 4, i + 2, i + 1.
#pragma once

#include <stdint.h>

#define ENGINE_INLINE static inline __attribute__((always_inline))

#if ENGINE_ISA_avx512
#include "cpu/kernels/vec_avx512.h"
#elif ENGINE_ISA_avx2
#include "cpu/kernels/vec_avx2.h"
#else
#include "cpu/kernels/vec_portable.h"
#endif

namespace engine::cpu {
namespace ENGINE_ISA {

// e^x to about 1 ulp, the same bits on every set with FMA; 0 below -87.3, finite above 88.
// Method: x = n ln 2 + r with |r| <= ln(2)/2, degree-7 Taylor polynomial for e^r, scaled by 2^n.
ENGINE_INLINE Vec16 exp(Vec16 x) {
  const Vec16 kUnderflow = set1(-87.3f);
  const Vec16 clamped = min(max(x, kUnderflow), set1(88.0f));
  // Adding 1.5 * 2^23 rounds to the nearest integer, which is then in the low mantissa bits.
  const Vec16 kRound = set1(12582912.0f);
  const Vec16 shifted = fma(clamped, set1(1.44269504088896341f), kRound);
  const Vec16 n = sub(shifted, kRound);
  Vec16 r = fma(n, set1(-0.693359375f), clamped);  // ln 2 in two parts: the first is exact
  r = fma(n, set1(2.12194440e-4f), r);
  Vec16 p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return zero_where_less(scale_by_pow2(p, shifted), x, kUnderflow);
}

// tanh to a few ulp, the same bits on every set with FMA. Where |x| < 0.625, x + x^3 P(x^2) with P
// fitted to least relative error; elsewhere 1 - 2 / (e^2x + 1).
ENGINE_INLINE Vec16 tanh(Vec16 x) {
  const Vec16 magnitude = max(x, sub(zero(), x));
  const Vec16 square = mul(x, x);
  Vec16 p = set1(-0.00570498407f);
  p = fma(p, square, set1(0.0206390843f));
  p = fma(p, square, set1(-0.0537397154f));
  p = fma(p, square, set1(0.133314416f));
  p = fma(p, square, set1(-0.333332807f));
  const Vec16 small = fma(mul(p, square), x, x);
  const Vec16 one = set1(1.0f);
  const Vec16 large = sub(one, div(set1(2.0f), add(exp(add(x, x)), one)));
  // Each is zeroed where the other holds; 0.62499994 is the float before 0.625.
  return add(zero_where_less(large, magnitude, set1(0.625f)),
             zero_where_less(small, set1(0.62499994f), magnitude));
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
