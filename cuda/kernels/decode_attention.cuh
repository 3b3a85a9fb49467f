// Decode attention on tensor cores.
//
// Tokens are the rows of the tensor cores' tiles and query heads their columns: scores [16 tokens, 8 heads] are
// keys times queries, and the sums [D, 8 heads] are values, transposed while they are loaded, times weights.
// Each key and value so crosses the registers once for eight heads, and no multiplication is spent on rows that
// do not exist when a group has eight heads or fewer.
//
// A warp has a ring of slots, each the keys or the values of one tile, that it fills by itself 16 bytes at a
// time: it waits for no other warp while it walks. Rows of a slot are swizzled so that the eight rows of a
// matrix lie in different banks. Bytes on their way, not arithmetic, are what the shape is chosen for;
// docs/gpu.md has the numbers.
#pragma once

#include "kernels/decode_work.cuh"

namespace engine::cuda {

template <typename Element, int kD>
struct Ring {
  static constexpr bool kIsFloat8 = sizeof(Element) == 1;
  static constexpr int kRowBytes = kD * static_cast<int>(sizeof(Element));
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kElements = 16 / static_cast<int>(sizeof(Element));  // of a chunk
  static constexpr int kScalesAt = kTileTokens * kRowBytes;
  static constexpr int kSlotBytes = kScalesAt + (kIsFloat8 ? kTileTokens * 4 : 0);
  // 16 KiB a warp; three slots at least, so that one is read while two are filled.
  static constexpr int kFit = 16384 / (kTileTokens * kRowBytes);
  static constexpr int kSlots = kFit < 3 ? 3 : kFit > 8 ? 8 : kFit;
  static constexpr int kWarpBytes = kSlots * kSlotBytes;

  // Where a chunk of 16 bytes of a row lies in a slot.
  __device__ static int chunk_at(int row, int chunk) {
    const int shift = kChunks >= 8 ? row % 8 : row / 2 % 4;
    return row * kRowBytes + (chunk ^ shift) * 16;
  }
};

// Bytes of shared memory of a block: the rings while tokens are walked, and the warps' results after.
template <typename Element, int kD>
constexpr int kDecodeShared = kDecodeWarps * Ring<Element, kD>::kWarpBytes >
                                      static_cast<int>(sizeof(WarpResults<kD>))
                                  ? kDecodeWarps * Ring<Element, kD>::kWarpBytes
                                  : static_cast<int>(sizeof(WarpResults<kD>));

// Starts to copy the keys or values of a tile into a slot. Rows of tokens that are not seen become zeros: slots
// of the cache that hold no token may hold NaN, which a weight of zero does not take away.
template <typename Element, int kD>
__device__ inline void copy_tile(const DecodeArgs& args, const Work& work, const TilePlace& place,
                                 int first_token, bool is_value, unsigned char* slot) {
  using R = Ring<Element, kD>;
  const CacheArgs& cache = args.cache;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int64_t block = place.block < 0 ? 0 : place.block;
  const auto* head = static_cast<const Element*>(is_value ? cache.values : cache.keys) +
                     block * (is_value ? cache.v_block_stride : cache.k_block_stride) +
                     (static_cast<int64_t>(work.g) * cache.S + place.offset) * cache.D;
#pragma unroll
  for (int i = 0; i < kTileTokens * R::kChunks / kWarpLanes; ++i) {
    const int row = (lane + i * kWarpLanes) / R::kChunks, chunk = (lane + i * kWarpLanes) % R::kChunks;
    if (chunk * R::kElements >= cache.D) continue;
    const int token = first_token + row;
    const bool is_seen = place.block >= 0 && token >= work.begin && token < work.end;
    cp_async(slot + R::chunk_at(row, chunk), head + row * cache.D + chunk * R::kElements, is_seen);
  }
  if (R::kIsFloat8 && lane < kTileTokens / 4) {
    const float* scales = cache.scales + block * cache.scales_block_stride +
                          static_cast<int64_t>(2 * work.g + is_value) * cache.S + place.offset;
    cp_async(slot + R::kScalesAt + lane * 16, scales + lane * 4);
  }
}

// Four fp8 codes as two pairs of bfloat16, exactly: their exponent and mantissa are moved to where those of a
// bfloat16 lie, and the difference of the exponents' offsets is multiplied in. `first` and `second` choose the
// codes of a pair.
__device__ inline uint32_t widen_codes(uint32_t codes, uint32_t selector) {
  constexpr uint32_t kTwoTo120 = 0x7b807b80u;
  const uint32_t spread = __byte_perm(codes, 0, selector);  // a code in the upper byte of each half
  return multiply_pairs((spread & 0x80008000u) | ((spread & 0x7f007f00u) >> 4), kTwoTo120);
}

// The product of scores: rows of keys, as load_matrices gives them. Of fp8 a lane has four neighbouring
// elements of a row where it should have two pairs eight apart: load_queries puts the queries in the same
// order.
template <typename Multiplied, typename Element, int kD>
__device__ inline void score_tile(const unsigned char* slot, int D, const uint32_t (&queries)[kD / 16][2],
                                  float (&scores)[4]) {
  using R = Ring<Element, kD>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, row = lane % 16, upper = lane / 16;
  float other[4] = {};  // two chains of sums, which do not wait for each other
#pragma unroll
  for (int t = 0; t < kD / 16; t += R::kIsFloat8 ? 2 : 1) {
    if (t * 16 >= D) break;
    uint32_t keys[4];
    if constexpr (R::kIsFloat8) {
      // Matrices: tokens 0 to 7 and 8 to 15 of elements 16 t and on, then of the next 16.
      load_matrices(slot + R::chunk_at(row, t + upper), keys);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((t + i) * 16 >= D) break;
        const uint32_t a[4] = {widen_codes(keys[2 * i], 0x1404), widen_codes(keys[2 * i + 1], 0x1404),
                               widen_codes(keys[2 * i], 0x3424), widen_codes(keys[2 * i + 1], 0x3424)};
        multiply_tiles<Multiplied>(i == 0 ? scores : other, a, queries[t + i]);
      }
    } else {
      load_matrices(slot + R::chunk_at(row, 2 * t + upper), keys);
      multiply_tiles<Multiplied>(t % 2 == 0 ? scores : other, keys, queries[t]);
    }
  }
  for (int i = 0; i < 4; ++i) scores[i] += other[i];
}

// Adds values times weights. Of fp8 a lane gets pairs of neighbouring elements for two tokens: the even ones
// are rows 0 to 7 of a tile, the odd ones rows 8 to 15.
template <typename Multiplied, typename Element, int kD>
__device__ inline void add_tile(const unsigned char* slot, int D, const uint32_t (&weights)[2],
                                float (&sums)[kD / 16][4]) {
  using R = Ring<Element, kD>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int t = 0; t < kD / 16; t += R::kIsFloat8 ? 2 : 1) {
    if (t * 16 >= D) break;
    uint32_t values[4];
    if constexpr (R::kIsFloat8) {
      load_matrices_transposed(slot + R::chunk_at(lane % 16, t + lane / 16), values);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((t + i) * 16 >= D) break;
        const uint32_t a[4] = {widen_codes(values[2 * i], 0x2404), widen_codes(values[2 * i], 0x3414),
                               widen_codes(values[2 * i + 1], 0x2404), widen_codes(values[2 * i + 1], 0x3414)};
        multiply_tiles<Multiplied>(sums[t + i], a, weights);
      }
    } else {
      // Matrices: elements 16 t and on, and eight further, of tokens 0 to 7; then both of tokens 8 to 15.
      load_matrices_transposed(slot + R::chunk_at(lane % 8 + lane / 16 * 8, 2 * t + lane / 8 % 2), values);
      multiply_tiles<Multiplied>(sums[t], values, weights);
    }
  }
}

// Elements 2 i and 2 i + 1 of a head as a pair of Multiplied.
template <typename Multiplied, typename T>
__device__ inline uint32_t load_pair(const T* from) {
  const auto pair = load_vec<Pack<T, 2>>(from);
  return pack_pair<Multiplied>(to_float(pair.at[0]), to_float(pair.at[1]));
}

template <typename T, typename Multiplied, typename Element, int kD>
__device__ inline void load_queries(const DecodeArgs& args, const Work& work, uint32_t (&queries)[kD / 16][2]) {
  constexpr bool kIsFloat8 = Ring<Element, kD>::kIsFloat8;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, head = lane / 4;
  const T* q = static_cast<const T*>(args.q) + work.query * args.q_stride +
               static_cast<int64_t>(work.first_head + head) * args.cache.D;
#pragma unroll
  for (int t = 0; t < kD / 16; ++t) {
    const bool is_there = t * 16 < args.cache.D && head < work.num_heads;
    const int first = t * 16 + lane % 4 * (kIsFloat8 ? 4 : 2), second = first + (kIsFloat8 ? 2 : 8);
    queries[t][0] = is_there ? load_pair<Multiplied>(q + first) : 0;
    queries[t][1] = is_there ? load_pair<Multiplied>(q + second) : 0;
  }
}

// The running softmax of one warp. A lane has tokens lane / 4 and that plus 8 of heads 2 (lane % 4) and the
// next.
template <int kD>
struct Walk {
  float sums[kD / 16][4] = {};
  float maximum[2] = {-kInfinity, -kInfinity};
  float sum[2] = {};  // of this lane's tokens
};

// Turns scores into weights.
template <int kD>
__device__ inline void weigh(const DecodeArgs& args, const Work& work, int first_token, const float* key_scales,
                             float (&scores)[4], Walk<kD>& walk) {
  const int row = static_cast<int>(threadIdx.x) % kWarpLanes / 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int in_tile = row + i / 2 * 8, token = first_token + in_tile;
    float score = scores[i] * args.scale;
    if (key_scales != nullptr) score *= key_scales[in_tile];
    scores[i] = token >= work.begin && token < work.end ? finish_score(args, score) : -kInfinity;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest = fmaxf(scores[h], scores[h + 2]);
    for (int step = 4; step < kWarpLanes; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    const float maximum = fmaxf(walk.maximum[h], largest);
    // A tile none of whose scores is a number above minus infinity has no maximum to subtract.
    const float shift = maximum == -kInfinity ? 0.0f : maximum;
    if (__any_sync(kAllLanes, maximum != walk.maximum[h])) {
      const float factor = exp2f(walk.maximum[h] - shift);
      walk.sum[h] *= factor;
#pragma unroll
      for (int t = 0; t < kD / 16; ++t) {
        walk.sums[t][h] *= factor;
        walk.sums[t][h + 2] *= factor;
      }
      walk.maximum[h] = maximum;
    }
    scores[h] = exp2f(scores[h] - shift);
    scores[h + 2] = exp2f(scores[h + 2] - shift);
    walk.sum[h] += scores[h] + scores[h + 2];
  }
}

// Weights [tokens, heads] as the tensor cores take the right side of a product.
template <typename Multiplied>
__device__ inline void pack_weights(const float* value_scales, float (&weights)[4], uint32_t (&packed)[2]) {
  const int row = static_cast<int>(threadIdx.x) % kWarpLanes / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float first = weights[2 * half], second = weights[2 * half + 1];
    if (value_scales != nullptr) {
      // A token that is not seen may have any scale, NaN too.
      const float scale = value_scales[row + half * 8];
      first = first == 0.0f ? 0.0f : first * scale;
      second = second == 0.0f ? 0.0f : second * scale;
    }
    packed[half] = transpose_matrix(pack_pair<Multiplied>(first, second));
  }
}

// All tiles of a warp. Slots are filled in the order keys, values, keys of the next tile, ...
template <typename T, typename Multiplied, typename Element, int kD>
__device__ inline void walk_tiles(const DecodeArgs& args, const Work& work, unsigned char* ring,
                                  Walk<kD>& walk) {
  using R = Ring<Element, kD>;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  TilePlaces places(args, work, warp);
  const int num_slots_filled = 2 * places.count();
  TilePlace place{};
  const auto fill = [&](int i) {
    if (i < num_slots_filled) {
      if (i % 2 == 0) place = places.find(i / 2);
      copy_tile<Element, kD>(args, work, place, places.first_token(i / 2), i % 2 != 0,
                             ring + i % R::kSlots * R::kSlotBytes);
    }
    commit_copies();
  };
  for (int i = 0; i < R::kSlots; ++i) fill(i);
  uint32_t queries[kD / 16][2];
  load_queries<T, Multiplied, Element, kD>(args, work, queries);
  for (int step = 0; step < places.count(); ++step) {
    const unsigned char* keys = ring + 2 * step % R::kSlots * R::kSlotBytes;
    const unsigned char* values = ring + (2 * step + 1) % R::kSlots * R::kSlotBytes;
    const auto scales_in = [](const unsigned char* slot) {
      return R::kIsFloat8 ? reinterpret_cast<const float*>(slot + R::kScalesAt) : nullptr;
    };
    float scores[4] = {};
    wait_copies<R::kSlots - 1>();
    sync_warp();
    score_tile<Multiplied, Element, kD>(keys, args.cache.D, queries, scores);
    weigh<kD>(args, work, places.first_token(step), scales_in(keys), scores, walk);
    sync_warp();
    fill(2 * step + R::kSlots);
    wait_copies<R::kSlots - 1>();
    sync_warp();
    uint32_t weights[2];
    pack_weights<Multiplied>(scales_in(values), scores, weights);
    add_tile<Multiplied, Element, kD>(values, args.cache.D, weights, walk.sums);
    sync_warp();
    fill(2 * step + 1 + R::kSlots);
  }
  wait_copies<0>();
}

template <typename Element, int kD>
__device__ inline void store_walk(int D, Walk<kD>& walk, WarpResults<kD>& results) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes,
            lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int step = 4; step < kWarpLanes; step *= 2) {
      walk.sum[h] += __shfl_xor_sync(kAllLanes, walk.sum[h], step);
    }
    const int head = 2 * (lane % 4) + h;
    if (lane < 4) {
      results.maximum[warp][head] = walk.maximum[h];
      results.sum[warp][head] = walk.sum[h];
    }
#pragma unroll
    for (int t = 0; t < kD / 16; ++t) {
      if (t * 16 >= D) break;
      constexpr bool kIsFloat8 = sizeof(Element) == 1;
      const int first = t * 16 + lane / 4 * (kIsFloat8 ? 2 : 1), second = first + (kIsFloat8 ? 1 : 8);
      results.values[warp][head][first] = walk.sums[t][h];
      results.values[warp][head][second] = walk.sums[t][h + 2];
    }
  }
}

// T: of q and out. Multiplied: what the tensor cores take. Element: of the cache. kD: the head dim, or more.
template <typename T, typename Multiplied, typename Element, int kD>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_attention_kernel(DecodeArgs args, unsigned num_pieces) {
  auto* shared = dynamic_shared<unsigned char>();
  auto& results = *dynamic_shared<WarpResults<kD>>();
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  for (unsigned piece = blockIdx.x; piece < num_pieces; piece += gridDim.x) {
    Work work;
    if (!find_work(args, piece, work)) continue;
    Walk<kD> walk;
    walk_tiles<T, Multiplied, Element, kD>(args, work, shared + warp * Ring<Element, kD>::kWarpBytes, walk);
    __syncthreads();
    store_walk<Element, kD>(args.cache.D, walk, results);
    finish_work<T, kD>(args, work, results);
  }
}

}  // namespace engine::cuda
