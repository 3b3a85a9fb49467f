// Arguments of the CPU kernels: plain data, checked by ops/ before a kernel sees it.
// Row strides are in elements. The letters are those of the design: T step tokens, B sequences,
// H query heads, G KV heads, D head dim, N blocks, S block size, V vocabulary.
#pragma once

#include <cstdint>

namespace engine {

// Work item: one row.
struct RmsNormArgs {
  const float* x;      // [T, n]
  float* residual;     // [T, n], or null: then x is normalised as it is
  const float* weight; // [n]
  float* out;          // [T, n]
  int64_t x_stride, residual_stride, out_stride;
  int64_t n;
  float eps;
};

}  // namespace engine
