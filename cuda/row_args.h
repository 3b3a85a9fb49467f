// Arguments of the kernels that go over rows: plain data, checked by ops_rows.cc before a launcher sees it.
// Strides are in elements. All pointers are of the device, and rows have the dtype that `format` says.
#pragma once

#include <cstdint>

#include "kernel_args.h"

namespace engine::cuda {

// Row i is row i % heads of the tensors' i / heads: heads is 1 for [T, n].
struct RmsNormArgs {
  const void* x;        // [T, n], or [T, heads, n]
  void* residual;       // [T, n], to which x is added first, or null: then x is normalised as it is
  const float* weight;  // [n]
  void* out;            // as x, may be x
  int64_t x_stride, residual_stride, out_stride;
  int64_t num_rows;  // T * heads
  int32_t n, heads;
  float eps;
  Format format;
};

enum class Gate : uint8_t { kSilu, kTanhGelu, kErfGelu, kClampedSwiglu };

struct GatedArgs {
  const void* gate_up;  // [T, 2n]: gate, then up
  void* out;            // [T, n]
  int64_t gate_up_stride, out_stride;
  int64_t T, n;
  float alpha, limit;  // of kClampedSwiglu
  Gate gate;
  Format format;
};

struct SoftcapArgs {
  float* x;  // [T, n]
  int64_t x_stride;
  int64_t T, n;
  float cap;
};

struct EmbeddingArgs {
  const int32_t* token_ids;  // [T]; a row for an id outside [0, V) becomes zero
  const void* weight;        // [V, K]
  void* out;                 // [T, K]
  int64_t weight_stride, out_stride;
  int64_t T, V, K;
  Format format;
};

}  // namespace engine::cuda
