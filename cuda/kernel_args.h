// Arguments of the CUDA kernels: plain data, checked by cuda/ops_*.cc before a launcher sees it.
// Strides are in elements. The letters are those of engine/kernel_args.h: T step tokens, B sequences, H query
// heads, G KV heads, D head dim, N blocks, S block size, V vocabulary. All pointers are of the device.
#pragma once

#include <cstdint>

namespace engine::cuda {

// What activations are stored as.
enum class Format : uint8_t { kFloat32, kBFloat16, kFloat16 };

// One block of a layer's cache after the other: [N, G, S, D], a token's head contiguous. With scales, elements
// are fp8 e4m3, and a number is its element times its token and KV head's scale.
struct CacheArgs {
  void* keys;
  void* values;
  float* scales;  // [N, G, 2, S], keys' before values'; or null: elements have the format of activations
  int64_t k_block_stride, v_block_stride, scales_block_stride;
  int32_t N, G, S, D;
};

// Turning pairs of elements by the angle of their position; see RopeArgs of engine/kernel_args.h.
struct RotationArgs {
  void* q;                   // [T, H, D], turned in place
  const float* cos;          // [P, half]
  const float* sin;          // [P, half]
  const int32_t* positions;  // [T]; those outside [0, P) leave their row as it is
  int64_t q_stride;
  int32_t H, P, half;
};

struct AppendKvArgs {
  const void* k;  // [T, G, D]
  const void* v;  // [T, G, D]
  CacheArgs cache;
  const int64_t* slot_ids;  // [T]; tokens whose slot lies outside [0, N * S) are not stored
  int64_t k_stride, v_stride;
  int32_t T;
  Format format;
};

}  // namespace engine::cuda
