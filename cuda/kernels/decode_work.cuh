// What decode attention computes in a block at a time, and how results of warps and of splits are joined.
//
// A piece of work is one row, one KV head, up to eight of the query heads that share it, and one split of the
// keys. The grid is as large as the device holds at a time, and each block takes every so manyth piece: the
// same launch serves rows of any length, so that it can be recorded in a graph. Pieces run over splits slowest:
// those that a short row does not have come last.
//
// Within a piece warp w takes the tiles of 16 tokens whose number, counted from the sequence's first token, is
// w modulo the number of warps. What is added to what therefore follows from the row alone.
#pragma once

#include "kernel_args.h"
#include "simt.h"

namespace engine::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * kWarpLanes;
constexpr int kTileTokens = 16;
constexpr float kLog2E = 1.4426950408889634f;

__device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__device__ inline int larger(int a, int b) { return a > b ? a : b; }

struct Work {
  int row, query, sequence, g;
  int first_head, num_heads;  // of q
  int split, num_splits;      // counted from the first that the row sees
  int begin, end;             // tokens
  int64_t arrivals;           // index of the counter of this row and these heads
};

__device__ inline int head_tiles(const DecodeArgs& args) {
  return (args.H / args.cache.G + kDecodeHeads - 1) / kDecodeHeads;
}

// False where there is nothing to do.
__device__ inline bool find_work(const DecodeArgs& args, unsigned piece, Work& work) {
  const unsigned tiles = static_cast<unsigned>(head_tiles(args)),
                 num_groups = static_cast<unsigned>(args.cache.G);
  const unsigned tile = piece % tiles, rest = piece / tiles;
  work.g = static_cast<int>(rest % num_groups);
  work.row = static_cast<int>(rest / num_groups % static_cast<unsigned>(args.R));
  work.split = static_cast<int>(rest / num_groups / static_cast<unsigned>(args.R));
  work.sequence = args.sequences[work.row];
  if (work.sequence < 0 || work.sequence >= args.B) return false;
  work.query = args.cu_seqlens_q[work.sequence + 1] - 1;
  const int end = args.kv_lens[work.sequence], begin = args.window > 0 ? larger(end - args.window, 0) : 0;
  if (work.query < 0 || work.query >= args.T || end <= 0) return false;
  const int tokens = split_tokens(end), first_split = begin / tokens;
  work.num_splits = (end + tokens - 1) / tokens - first_split;
  // More than max_splits: a row longer than the launch was told, whose results have no place.
  if (work.split >= work.num_splits || work.num_splits > args.max_splits) return false;
  work.begin = larger(begin, (first_split + work.split) * tokens);
  work.end = smaller(end, (first_split + work.split + 1) * tokens);
  const int group = args.H / args.cache.G;
  work.first_head = work.g * group + static_cast<int>(tile) * kDecodeHeads;
  work.num_heads = smaller(kDecodeHeads, group - static_cast<int>(tile) * kDecodeHeads);
  work.arrivals = (static_cast<int64_t>(work.row) * args.cache.G + work.g) * tiles + tile;
  return true;
}

// One tile of tokens in the cache.
struct TilePlace {
  int64_t block;  // negative: the table names none
  int offset;     // in the block
};

// Block ids for 32 tiles of a warp at a time, one a lane: a tile's block is known when its copies start.
class TilePlaces {
 public:
  __device__ TilePlaces(const DecodeArgs& args, const Work& work, int warp)
      : args_(args), table_(args.block_tables + work.sequence * args.block_tables_stride) {
    const int first = work.begin / kTileTokens;
    first_tile_ = first + (warp - first % kDecodeWarps + kDecodeWarps) % kDecodeWarps;
    const int end_tile = (work.end + kTileTokens - 1) / kTileTokens;
    count_ = larger(0, (end_tile - first_tile_ + kDecodeWarps - 1) / kDecodeWarps);
  }

  // Tiles of this warp.
  __device__ int count() const { return count_; }
  __device__ int first_token(int step) const { return (first_tile_ + step * kDecodeWarps) * kTileTokens; }

  // All lanes ask for the same step, and for steps in order.
  __device__ TilePlace find(int step) {
    if (step % kWarpLanes == 0) {
      const int mine = step + static_cast<int>(threadIdx.x) % kWarpLanes,
                column = first_token(mine) / args_.cache.S;
      id_ = mine < count_ && column < args_.num_columns ? table_[column] : -1;
    }
    const int id = __shfl_sync(kAllLanes, id_, step % kWarpLanes);
    return {id < args_.cache.N ? id : -1, first_token(step) % args_.cache.S};
  }

 private:
  const DecodeArgs& args_;
  const int32_t* table_;
  int first_tile_, count_;
  int id_ = -1;
};

// A score in units of log2, as softmax takes it.
__device__ inline float finish_score(const DecodeArgs& args, float score) {
  if (args.softcap > 0.0f) score = args.softcap * tanhf(score / args.softcap);
  return score * kLog2E;
}

// What each warp found, in shared memory: sums of weighted values, which are exponents of 2 over the maximum.
template <int kD>
struct WarpResults {
  // Rows are shifted by four banks each, so that the lanes that hold one token's heads write different ones.
  float values[kDecodeWarps][kDecodeHeads][kD + 4];
  float maximum[kDecodeWarps][kDecodeHeads];
  float sum[kDecodeWarps][kDecodeHeads];
  int is_last;
};

// Weighted values of two sets of keys become those of both: factors for each side, and what both have.
struct Joined {
  float maximum, sum;
};
__device__ inline float factor_of(float maximum, float joined) { return exp2f(maximum - joined); }

template <typename T>
__device__ inline void store_result(const DecodeArgs& args, const Work& work, int head, int d, Joined joined,
                                    float value) {
  float factor = 1.0f, sum = joined.sum;
  if (args.sinks != nullptr) {
    const float sink = args.sinks[head] * kLog2E, maximum = fmaxf(joined.maximum, sink);
    factor = factor_of(joined.maximum, maximum);
    sum = sum * factor + exp2f(sink - maximum);
  }
  T* out =
      static_cast<T*>(args.out) + work.query * args.out_stride + static_cast<int64_t>(head) * args.cache.D + d;
  *out = from_float<T>(value * factor / sum);
}

__device__ inline float* partial_of(const DecodeArgs& args, const Work& work, int split, int head) {
  const int64_t index = (static_cast<int64_t>(work.row) * args.max_splits + split) * args.H + head;
  return args.partials + index * partial_stride(args.cache.D);
}

// By the last block of a row and its heads: joins the splits from the first to the last.
template <typename T>
__device__ inline void join_splits(const DecodeArgs& args, const Work& work) {
  const int D = args.cache.D;
  for (int i = static_cast<int>(threadIdx.x); i < work.num_heads * D; i += kDecodeThreads) {
    const int head = work.first_head + i / D, d = i % D;
    Joined joined = {-kInfinity, 0.0f};
    for (int split = 0; split < work.num_splits; ++split) {
      joined.maximum = fmaxf(joined.maximum, load_written(partial_of(args, work, split, head) + D));
    }
    float value = 0.0f;
    for (int split = 0; split < work.num_splits; ++split) {
      const float* partial = partial_of(args, work, split, head);
      const float factor = factor_of(load_written(partial + D), joined.maximum);
      value += load_written(partial + d) * factor;
      joined.sum += load_written(partial + D + 1) * factor;
    }
    store_result<T>(args, work, head, d, joined, value);
  }
}

// Joins the warps' results in order; the last block of a row joins its splits.
template <typename T, int kD>
__device__ inline void finish_work(const DecodeArgs& args, const Work& work, WarpResults<kD>& results) {
  const int D = args.cache.D;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < work.num_heads * D; i += kDecodeThreads) {
    const int h = i / D, d = i % D;
    Joined joined = {-kInfinity, 0.0f};
    for (int warp = 0; warp < kDecodeWarps; ++warp)
      joined.maximum = fmaxf(joined.maximum, results.maximum[warp][h]);
    float value = 0.0f;
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      const float factor = factor_of(results.maximum[warp][h], joined.maximum);
      value += results.values[warp][h][d] * factor;
      joined.sum += results.sum[warp][h] * factor;
    }
    if (work.num_splits == 1) {
      store_result<T>(args, work, work.first_head + h, d, joined, value);
    } else {
      float* partial = partial_of(args, work, work.split, work.first_head + h);
      partial[d] = value;
      if (d == 0) {
        partial[D] = joined.maximum;
        partial[D + 1] = joined.sum;
      }
    }
  }
  if (work.num_splits > 1) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      results.is_last = atomicAdd(args.arrivals + work.arrivals, 1) == work.num_splits - 1;
      if (results.is_last) args.arrivals[work.arrivals] = 0;
    }
    __syncthreads();
    if (results.is_last) {
      __threadfence();
      join_splits<T>(args, work);
    }
  }
  __syncthreads();
}

}  // namespace engine::cuda
