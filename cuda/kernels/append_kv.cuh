// Keys and values of a step into the paged cache, keys turned by their position on the way.
//
// A few neighbouring lanes, a power of two, share one head of one token, and find its largest magnitude by
// shuffles. A lane takes units of two times kVector elements: of those that are turned together, i and i +
// half; behind them, and in heads that are not turned, of each half of what is left. So a head is read once, in
// vectors.
#pragma once

#include "kernel_args.h"
#include "simt.h"

namespace engine::cuda {

constexpr int kAppendThreads = 128;
constexpr float kLargestFloat8 = 448.0f;
// Below this, 448 over the largest magnitude could overflow; such a head is taken for zero.
constexpr float kTinyMagnitude = 1e-35f;
// Of elements one by one, a head of 256 has 128 units for 32 lanes.
template <int kVector>
constexpr int kUnits = kVector == 1 ? 4 : 1;

template <typename T, int kVector>
__device__ inline void load_unit(const T* from, float (&x)[kVector]) {
  const auto pack = load_vec<Pack<T, kVector>>(from);
  for (int i = 0; i < kVector; ++i) x[i] = to_float(pack.at[i]);
}

template <typename T, int kVector>
__device__ inline void store_unit(T* to, const float (&x)[kVector]) {
  Pack<T, kVector> pack;
  for (int i = 0; i < kVector; ++i) pack.at[i] = from_float<T>(x[i]);
  store_vec(to, pack);
}

template <int kVector>
__device__ inline void turn(const RotationArgs& rotation, int32_t position, int first, float (&x)[kVector],
                            float (&y)[kVector]) {
  float c[kVector], s[kVector];
  const int64_t at = static_cast<int64_t>(position) * rotation.half + first;
  load_unit<float, kVector>(rotation.cos + at, c);
  load_unit<float, kVector>(rotation.sin + at, s);
  for (int i = 0; i < kVector; ++i) {
    const float turned = __fadd_rn(__fmul_rn(x[i], c[i]), -__fmul_rn(y[i], s[i]));
    y[i] = __fadd_rn(__fmul_rn(y[i], c[i]), __fmul_rn(x[i], s[i]));
    x[i] = turned;
  }
}

// The units of one head that a lane holds.
template <int kVector>
struct HeadPart {
  float x[kUnits<kVector>][kVector], y[kUnits<kVector>][kVector];
  int first[kUnits<kVector>],
      second[kUnits<kVector>];  // elements where x and y belong; first < 0: nothing here
};

// Reads what `lane` of `lanes` has of a head whose first 2 `half` elements are turned; of none, where `half` is
// 0.
template <typename T, int kVector>
__device__ inline void load_head(const T* head, int D, int half, int lane, int lanes, HeadPart<kVector>& part) {
  const int rest = D / 2 - half;
  for (int i = 0; i < kUnits<kVector>; ++i) {
    const int at = (lane + i * lanes) * kVector;  // counted in pairs
    part.first[i] = head == nullptr || at >= D / 2 ? -1 : at < half ? at : half + at;
    part.second[i] = part.first[i] + (at < half ? half : rest);
    for (int v = 0; v < kVector; ++v) part.x[i][v] = part.y[i][v] = 0.0f;
    if (part.first[i] < 0) continue;
    load_unit<T, kVector>(head + part.first[i], part.x[i]);
    load_unit<T, kVector>(head + part.second[i], part.y[i]);
  }
}

template <typename T, int kVector>
__device__ inline void store_head(const HeadPart<kVector>& part, T* head) {
  for (int i = 0; i < kUnits<kVector>; ++i) {
    if (part.first[i] < 0) continue;
    store_unit<T, kVector>(head + part.first[i], part.x[i]);
    store_unit<T, kVector>(head + part.second[i], part.y[i]);
  }
}

// Factors from numbers to codes, and back; one that is not finite makes the second NaN.
struct Scales {
  float factor, scale;
};

template <int kVector>
__device__ inline Scales scales_of(const HeadPart<kVector>& part, int lanes) {
  float largest = 0.0f;
  for (int i = 0; i < kUnits<kVector>; ++i) {
    for (int v = 0; v < kVector; ++v) {
      const float x = fabsf(part.x[i][v]), y = fabsf(part.y[i][v]);
      const bool is_finite = x <= kLargestFloat && y <= kLargestFloat;
      largest = fmaxf(largest, is_finite ? fmaxf(x, y) : kInfinity);
    }
  }
  largest = reduce_max(largest, lanes);
  if (largest < kTinyMagnitude) return {0.0f, 0.0f};
  return {kLargestFloat8 / largest, largest <= kLargestFloat ? largest / kLargestFloat8 : kNotANumber};
}

template <int kVector>
__device__ inline void store_codes(const HeadPart<kVector>& part, float factor, Float8* head) {
  for (int i = 0; i < kUnits<kVector>; ++i) {
    if (part.first[i] < 0) continue;
    Pack<Float8, kVector> x, y;
    for (int v = 0; v < kVector; ++v) {
      x.at[v] = to_float8(part.x[i][v] * factor);
      y.at[v] = to_float8(part.y[i][v] * factor);
    }
    store_vec(head + part.first[i], x);
    store_vec(head + part.second[i], y);
  }
}

// Grid: enough threads for `lanes` of each of the heads of all tokens: those of q if it is turned, k, and v.
template <typename T, int kVector, bool kIsTurned, bool kIsFloat8>
__global__ void __launch_bounds__(kAppendThreads)
    append_kv_kernel(AppendKvArgs args, RotationArgs rotation, int lanes) {
  const CacheArgs& cache = args.cache;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kAppendThreads + threadIdx.x;
  const int num_queries = kIsTurned ? rotation.H : 0, heads = num_queries + 2 * cache.G, D = cache.D;
  const int64_t t = thread / lanes / heads;
  const int head = static_cast<int>(thread / lanes % heads), lane = static_cast<int>(thread % lanes);
  const bool is_query = head < num_queries, is_value = head >= num_queries + cache.G;
  const int g = is_query ? 0 : (head - num_queries) % cache.G;
  const int64_t slot = t < args.T ? args.slot_ids[t] : -1;
  const bool is_stored = !is_query && slot >= 0 && slot < static_cast<int64_t>(cache.N) * cache.S;

  T* query = nullptr;
  const T* from = nullptr;
  if (kIsTurned && is_query && t < args.T) {
    from = query = static_cast<T*>(rotation.q) + t * rotation.q_stride + static_cast<int64_t>(head) * D;
  } else if (is_stored) {
    from = (is_value ? static_cast<const T*>(args.v) + t * args.v_stride
                     : static_cast<const T*>(args.k) + t * args.k_stride) +
           static_cast<int64_t>(g) * D;
  }
  HeadPart<kVector> part;
  const int half = kIsTurned && !is_value ? rotation.half : 0;
  load_head<T, kVector>(from, D, half, lane, lanes, part);
  if (kIsTurned && !is_value && from != nullptr) {
    const int32_t position = rotation.positions[t];
    for (int i = 0; i < kUnits<kVector> && position >= 0 && position < rotation.P; ++i) {
      const int first = part.first[i];
      if (first >= 0 && first < half) turn<kVector>(rotation, position, first, part.x[i], part.y[i]);
    }
  }
  // No lane is gone yet: heads find their scales together.
  const Scales scales = kIsFloat8 ? scales_of<kVector>(part, lanes) : Scales{};
  if (query != nullptr) store_head<T, kVector>(part, query);
  if (!is_stored) return;

  const int64_t block = slot / cache.S, offset = slot % cache.S;
  const int64_t in_block = (static_cast<int64_t>(g) * cache.S + offset) * D;
  const int64_t to = block * (is_value ? cache.v_block_stride : cache.k_block_stride) + in_block;
  void* elements = is_value ? cache.values : cache.keys;
  if (kIsFloat8) {
    store_codes<kVector>(part, scales.factor, static_cast<Float8*>(elements) + to);
    float* of_block = cache.scales + block * cache.scales_block_stride;
    if (lane == 0) of_block[static_cast<int64_t>(2 * g + is_value) * cache.S + offset] = scales.scale;
  } else {
    store_head<T, kVector>(part, static_cast<T*>(elements) + to);
  }
}

}  // namespace engine::cuda
