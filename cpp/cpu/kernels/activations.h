// The non-linear functions of MLPs. Include only from files in this folder, like vec.h.
#pragma once

#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {

// Silu and TanhGelu are x / (1 + e^y), and zero where e^y passes the range of exp(): the results there
// are smaller than 1e-36.
struct Silu {
  ENGINE_INLINE Vec16 apply(Vec16 x) {
    const Vec16 one = set1(1.0f);
    return zero_where_less(div(x, add(one, exp(sub(zero(), x)))), x, set1(-88.0f));
  }
};

// x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^-2u).
struct TanhGelu {
  ENGINE_INLINE Vec16 apply(Vec16 x) {
    const Vec16 one = set1(1.0f);
    const Vec16 minus_2u_over_x = mul(set1(-1.5957691216f), fma(mul(x, x), set1(0.044715f), one));
    return zero_where_less(div(x, add(one, exp(mul(minus_2u_over_x, x)))), x, set1(-10.0f));
  }
};

// x (1 + erf(x / sqrt 2)) / 2. erf(y) = y P(y^2) / Q(y^2) up to |y| = 3.925, where it rounds to 1: P and Q
// fitted to least relative error (2e-8; 4e-7 with the rounding of the arithmetic).
struct ErfGelu {
  ENGINE_INLINE Vec16 apply(Vec16 x) {
    const Vec16 kLimit = set1(3.925f);
    const Vec16 y = min(max(mul(x, set1(0.70710678119f)), sub(zero(), kLimit)), kLimit);
    const Vec16 square = mul(y, y);
    Vec16 p = set1(2.0461825442907866e-06f);
    p = fma(p, square, set1(0.00028483057394623756f));
    p = fma(p, square, set1(0.0037718554958701134f));
    p = fma(p, square, set1(0.052767135202884674f));
    p = fma(p, square, set1(0.1905771791934967f));
    p = fma(p, square, set1(1.1283791065216064f));
    Vec16 q = set1(3.8048721762606874e-05f);
    q = fma(q, square, set1(0.0011636950075626373f));
    q = fma(q, square, set1(0.01498179417103529f));
    q = fma(q, square, set1(0.11417590081691742f));
    q = fma(q, square, set1(0.5022273659706116f));
    q = fma(q, square, set1(1.0f));
    const Vec16 half = mul(x, set1(0.5f));
    return fma(half, div(mul(y, p), q), half);
  }
};

struct Relu {
  ENGINE_INLINE Vec16 apply(Vec16 x) { return zero_where_less(x, x, zero()); }
};

struct Tanh {
  ENGINE_INLINE Vec16 apply(Vec16 x) { return tanh(x); }
};

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
