// Arguments of the CUDA kernels: plain data, checked by cuda/ops_*.cc before a launcher sees it.
// Strides are in elements. The letters are those of engine/kernel_args.h: T step tokens, B sequences, H query
// heads, G KV heads, D head dim, N blocks, S block size, V vocabulary. All pointers are of the device.
#pragma once

#include <cstdint>

// For what launchers and kernels compute alike.
#ifdef __CUDACC__
#define ENGINE_HOST_DEVICE __host__ __device__
#else
#define ENGINE_HOST_DEVICE
#endif

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

// Keys are walked in splits whose results are joined in order. A split has kDecodeSplit tokens, or as many
// times twice that as it takes to have no more than kMostSplits of them: it follows from the length of the row
// alone.
constexpr int32_t kDecodeSplit = 256;
constexpr int32_t kMostSplits = 64;
ENGINE_HOST_DEVICE constexpr int32_t split_tokens(int32_t num_tokens) {
  int32_t tokens = kDecodeSplit;
  while ((num_tokens - 1) / tokens >= kMostSplits) tokens *= 2;
  return tokens;
}
// No row of at most `num_tokens` tokens, of which it sees the last `window` (0: all), has more splits.
constexpr int32_t most_splits(int32_t num_tokens, int32_t window) {
  const int32_t whole =
      num_tokens > kMostSplits * kDecodeSplit ? kMostSplits : (num_tokens + kDecodeSplit - 1) / kDecodeSplit;
  const int32_t seen = window > 0 && window < num_tokens ? (window - 1) / kDecodeSplit + 2 : whole;
  return seen < whole ? seen : whole;
}

// Query heads that share a KV head are taken eight at a time: the columns of a tensor core's tile.
constexpr int32_t kDecodeHeads = 8;

// Floats of one partial result: values [D], the maximum, the sum of weights, and two that nobody reads.
ENGINE_HOST_DEVICE constexpr int64_t partial_stride(int64_t head_dim) { return head_dim + 4; }

// Rows that attend on their own: each one query.
struct DecodeArgs {
  const void* q;  // [T, H, D]
  void* out;      // [T, H, D]
  CacheArgs cache;
  const int32_t* sequences;     // [R], of each row, which is its sequence's last query
  const int32_t* cu_seqlens_q;  // [B + 1]
  const int32_t* kv_lens;       // [B]
  const int32_t* block_tables;  // [B, num_columns]
  const float* sinks;           // [H], or null
  float* partials;              // [R, max_splits, H, partial_stride(D)]
  int32_t* arrivals;            // [R, G, ceil(H / G / kDecodeHeads)], zeros before and after
  int64_t q_stride, out_stride, block_tables_stride;
  int32_t T, B, R, H, num_columns, max_splits;
  int32_t window;  // 0: none
  float scale, softcap;
  Format format;
};

}  // namespace engine::cuda
