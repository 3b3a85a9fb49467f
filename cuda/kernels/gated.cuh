// What happens element by element: the gates of MLPs and the soft bound of logits.
#pragma once

#include "row_args.h"
#include "rows.cuh"

namespace engine::cuda {

constexpr int kElementThreads = 128;

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Silu {
  __device__ explicit Silu(const GatedArgs&) {}
  __device__ float operator()(float gate, float up) const { return gate * sigmoid(gate) * up; }
};

// (1 + tanh(x)) / 2 is sigmoid(2 x).
struct TanhGelu {
  __device__ explicit TanhGelu(const GatedArgs&) {}
  __device__ float operator()(float gate, float up) const {
    return gate * sigmoid(1.5957691216057308f * (gate + 0.044715f * gate * gate * gate)) * up;
  }
};

struct ErfGelu {
  __device__ explicit ErfGelu(const GatedArgs&) {}
  // erfc() keeps its digits where 1 + erf() would lose them.
  __device__ float operator()(float gate, float up) const {
    return 0.5f * gate * erfcf(gate * -0.70710678118654752f) * up;
  }
};

struct ClampedSwiglu {
  float alpha, limit;

  __device__ explicit ClampedSwiglu(const GatedArgs& args) : alpha(args.alpha), limit(args.limit) {}
  // Comparisons that leave NaN as it is.
  __device__ float operator()(float gate, float up) const {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return (up + 1.0f) * (gate * sigmoid(alpha * gate));
  }
};

// The row and column of a thread; blocks of a row are neighbours.
struct Element {
  int64_t row, column;

  __device__ Element(int blocks_per_row, int num_columns) {
    row = blockIdx.x / blocks_per_row;
    const int64_t block = blockIdx.x % blocks_per_row;
    column = (block * kElementThreads + threadIdx.x) * num_columns;
  }
};

template <typename T, int kVector, typename Activation>
__global__ void __launch_bounds__(kElementThreads) gated_kernel(GatedArgs args, int blocks_per_row) {
  const Element at(blocks_per_row, kVector);
  if (at.column >= args.n) return;
  const T* gate = static_cast<const T*>(args.gate_up) + at.row * args.gate_up_stride + at.column;
  float gates[kVector], ups[kVector];
  read_unit(gate, gates);
  read_unit(gate + args.n, ups);
  const Activation activation(args);
#pragma unroll
  for (int i = 0; i < kVector; ++i) gates[i] = activation(gates[i], ups[i]);
  write_unit(static_cast<T*>(args.out) + at.row * args.out_stride + at.column, gates);
}

template <int kVector>
__global__ void __launch_bounds__(kElementThreads) softcap_kernel(SoftcapArgs args, int blocks_per_row) {
  const Element at(blocks_per_row, kVector);
  if (at.column >= args.n) return;
  float* x = args.x + at.row * args.x_stride + at.column;
  float values[kVector];
  read_unit(x, values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = args.cap * tanhf(values[i] / args.cap);
  write_unit(x, values);
}

// Unit: what is moved at a time, of one element or of 16 bytes.
template <typename Unit>
__global__ void __launch_bounds__(kElementThreads)
    embedding_kernel(EmbeddingArgs args, int64_t row_units, int64_t weight_stride, int64_t out_stride,
                     int blocks_per_row) {
  const Element at(blocks_per_row, 1);
  if (at.column >= row_units) return;
  const int64_t id = args.token_ids[at.row];
  Unit unit{};
  if (id >= 0 && id < args.V) {
    unit = load_vec<Unit>(static_cast<const Unit*>(args.weight) + id * weight_stride + at.column);
  }
  store_vec(static_cast<Unit*>(args.out) + at.row * out_stride + at.column, unit);
}

}  // namespace engine::cuda
