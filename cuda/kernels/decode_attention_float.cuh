// Decode attention of float32 activations, in float32: what other formats are compared with. Nothing here is
// fast.
//
// Four lanes share a head, each a quarter of its elements in runs of four.
#pragma once

#include "kernels/decode_work.cuh"

namespace engine::cuda {

constexpr int kFloatD = 256;

__device__ inline void load_four(const float* from, float (&x)[4]) {
  const auto pack = load_vec<Pack<float, 4>>(from);
  for (int i = 0; i < 4; ++i) x[i] = pack.at[i];
}
__device__ inline void load_four(const Float8* from, float (&x)[4]) {
  const auto pack = load_vec<Pack<Float8, 4>>(from);
  for (int i = 0; i < 4; ++i) {
    const uint32_t code = pack.at[i].bits;
    // As widen_codes: shifted to a float's exponent and mantissa, and multiplied by 2^120.
    x[i] = __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 1.329227995784916e36f;
  }
}

template <typename Element>
__device__ inline void walk_token(const DecodeArgs& args, const Work& work, const TilePlace& place, int token,
                                  const float* query, float (&sums)[kFloatD / 4], float& maximum, float& sum) {
  const CacheArgs& cache = args.cache;
  const int part = static_cast<int>(threadIdx.x) % 4, offset = place.offset + token % kTileTokens;
  const int64_t in_block = (static_cast<int64_t>(work.g) * cache.S + offset) * cache.D;
  const auto* key = static_cast<const Element*>(cache.keys) + place.block * cache.k_block_stride + in_block;
  const auto* value = static_cast<const Element*>(cache.values) + place.block * cache.v_block_stride + in_block;
  float score = 0.0f;
  for (int d = 4 * part; d < cache.D; d += 16) {
    float q[4], k[4];
    load_four(query + d, q);
    load_four(key + d, k);
    for (int i = 0; i < 4; ++i) score += q[i] * k[i];
  }
  score = reduce_add(score, 4) * args.scale;
  float value_scale = 1.0f;
  if (cache.scales != nullptr) {
    const float* scales = cache.scales + place.block * cache.scales_block_stride +
                          static_cast<int64_t>(2 * work.g) * cache.S + offset;
    score *= scales[0];
    value_scale = scales[cache.S];
  }
  score = finish_score(args, score);
  const float larger_one = fmaxf(maximum, score), shift = larger_one == -kInfinity ? 0.0f : larger_one;
  const float factor = exp2f(maximum - shift), weight = exp2f(score - shift);
  maximum = larger_one;
  sum = sum * factor + weight;
#pragma unroll
  for (int t = 0; t < kFloatD / 16; ++t) {
    if (t * 16 >= cache.D) break;
    float v[4];
    load_four(value + t * 16 + 4 * part, v);
    for (int i = 0; i < 4; ++i) sums[4 * t + i] = sums[4 * t + i] * factor + weight * value_scale * v[i];
  }
}

template <typename Element>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_attention_float_kernel(DecodeArgs args, unsigned num_pieces) {
  auto& results = *dynamic_shared<WarpResults<kFloatD>>();
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes,
            lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  for (unsigned piece = blockIdx.x; piece < num_pieces; piece += gridDim.x) {
    Work work;
    if (!find_work(args, piece, work)) continue;
    const int head = smaller(lane / 4, work.num_heads - 1);  // lanes of no head repeat the last one's work
    const float* query = static_cast<const float*>(args.q) + work.query * args.q_stride +
                         static_cast<int64_t>(work.first_head + head) * args.cache.D;
    float sums[kFloatD / 4] = {}, maximum = -kInfinity, sum = 0.0f;
    TilePlaces places(args, work, warp);
    for (int step = 0; step < places.count(); ++step) {
      const TilePlace place = places.find(step);
      const int first = places.first_token(step), end = smaller(work.end, first + kTileTokens);
      for (int token = larger(first, work.begin); token < end && place.block >= 0; ++token) {
        walk_token<Element>(args, work, place, token, query, sums, maximum, sum);
      }
    }
    results.maximum[warp][lane / 4] = maximum;
    results.sum[warp][lane / 4] = sum;
#pragma unroll
    for (int t = 0; t < kFloatD / 16; ++t) {
      for (int i = 0; i < 4; ++i) results.values[warp][lane / 4][16 * t + 4 * (lane % 4) + i] = sums[4 * t + i];
    }
    finish_work<float, kFloatD>(args, work, results);
  }
}

}  // namespace engine::cuda
