// Root-mean-square normalisation, after adding to the residual stream or not. Sums are taken in float32, in an
// order that depends on the length of a row alone.
#pragma once

#include "block.cuh"
#include "row_args.h"
#include "rows.cuh"

namespace engine::cuda {

// Short rows take a warp each, and share a block.
constexpr int kNormRowsPerBlock = 4;

struct RmsNormShared {
  float sums[kMaxWarps];
};

// blockDim.x threads a row, blockDim.y rows a block; more than one row only if a warp takes each.
template <typename T, int kVector>
__global__ void __launch_bounds__(1024) rms_norm_kernel(RmsNormArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= args.num_rows) return;
  const int64_t token = row / args.heads, column = row % args.heads * args.n;
  const T* x = static_cast<const T*>(args.x) + token * args.x_stride + column;
  T* residual = static_cast<T*>(args.residual);
  if (residual != nullptr) residual += token * args.residual_stride + column;
  T* out = static_cast<T*>(args.out) + token * args.out_stride + column;

  const int begin = kVector * thread_index(), step = kVector * num_threads();
  float first[kVector] = {};  // what a thread reads first stays with it: all there is, but for very long rows
  float squares = 0;
  for (int i = begin; i < args.n; i += step) {
    float values[kVector];
    read_unit(x + i, values);
    if (residual != nullptr) {
      float before[kVector];
      read_unit(residual + i, before);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = to_float(from_float<T>(before[j] + values[j]));
      write_unit(residual + i, values);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      squares += values[j] * values[j];
      if (i == begin) first[j] = values[j];
    }
  }
  squares = num_threads() == kWarpLanes ? reduce_add(squares)
                                        : sum_of_block(squares, dynamic_shared<RmsNormShared>()->sums);
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(args.n) + args.eps);
  for (int i = begin; i < args.n; i += step) {
    float values[kVector], weights[kVector];
    if (i != begin) read_unit(residual != nullptr ? residual + i : x + i, values);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (i == begin) values[j] = first[j];
      weights[j] = args.weight[i + j];
      values[j] = weights[j] * (values[j] * scale);
    }
    write_unit(out + i, values);
  }
}

}  // namespace engine::cuda
