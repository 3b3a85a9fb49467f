// What adapters add to a linear layer: out += scale (x A^T) B^T, for every row with its own adapter.
//
// The order of sums that promise P1 rests on (docs/decisions/0009-low-rank-adapters.md): an element of
// x A^T has 32 chains of fma, chain i over the k with k % 32 = i, ascending; chain i is added to chain
// i + 16, then lanes as reduce_add does; then it is scaled. An element of the result is one chain of fma
// over the ranks, ascending, from zero, added to the base's. Rows, threads and other adapters do
// not enter.
#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kLanes = 32;

// A tile of lora_shrink keeps 2 x rows x ranks vectors in registers, one of lora_expand 2 x rows.
#if ENGINE_ISA_avx512
constexpr int kShrinkRows = 2, kShrinkRanks = 4, kExpandRows = 8;
#elif ENGINE_ISA_avx2 || ENGINE_ISA_neon
constexpr int kShrinkRows = 1, kShrinkRanks = 2, kExpandRows = 2;
#else
constexpr int kShrinkRows = 1, kShrinkRanks = 1, kExpandRows = 1;
#endif

// As far ahead as linear.cc.
constexpr int64_t kPrefetchBytes = 4096;

struct Bf16Weights {
  using Element = uint16_t;
  ENGINE_INLINE void load_lanes(const Element* p, Vec16& low, Vec16& high) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);
    load_bf16_pairs(p, low, high);
  }
  ENGINE_INLINE float value(Element x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, sizeof(wide));
    return wide;
  }
};

struct Fp32Weights {
  using Element = float;
  ENGINE_INLINE void load_lanes(const Element* p, Vec16& low, Vec16& high) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes + 64);
    low = load(p);
    high = load(p + 16);
  }
  ENGINE_INLINE float value(Element x) { return x; }
};

ENGINE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ENGINE_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- x A^T

// Some rows of x with some ranks of one panel.
struct DotTile {
  const float* const* x;  // of each row
  float* const* out;      // of each row, at the first rank
  const float* scales;    // at the first rank
  int64_t in_features;
  int64_t height;  // ranks of the panel
};

template <int kRows>
ENGINE_INLINE void load_inputs(const float* const* rows, int64_t k, int64_t left, Vec16 (*x)[2]) {
  for (int row = 0; row < kRows; ++row) {
    const float* p = rows[row] + k;
    if (left >= kLanes) {
      x[row][0] = load(p);
      x[row][1] = load(p + 16);
    } else {
      x[row][0] = load_first(p, smaller(left, 16));
      x[row][1] = left > 16 ? load_first(p + 16, left - 16) : zero();
    }
  }
}

template <class Weights, int kRows, int kRanks>
void dot_tile(const DotTile& tile, const typename Weights::Element* weight) {
  Vec16 sums[kRows][kRanks][2];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int rank = 0; rank < kRanks; ++rank) sums[row][rank][0] = sums[row][rank][1] = zero();
  }
  for (int64_t k = 0; k < tile.in_features; k += kLanes, weight += tile.height * kLanes) {
    Vec16 x[kRows][2];
    load_inputs<kRows>(tile.x, k, tile.in_features - k, x);
#pragma GCC unroll 8
    for (int rank = 0; rank < kRanks; ++rank) {
      Vec16 a[2];
      Weights::load_lanes(weight + rank * kLanes, a[0], a[1]);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        sums[row][rank][0] = fma(x[row][0], a[0], sums[row][rank][0]);
        sums[row][rank][1] = fma(x[row][1], a[1], sums[row][rank][1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int rank = 0; rank < kRanks; ++rank) {
      tile.out[row][rank] = reduce_add(add(sums[row][rank][0], sums[row][rank][1])) * tile.scales[rank];
    }
  }
}

template <class Weights, int kRows, int kRanks = kShrinkRanks>
void dot_ranks(DotTile tile, int64_t num_ranks, const typename Weights::Element* weight) {
  float* out[kRows];
  for (int row = 0; row < kRows; ++row) out[row] = tile.out[row];
  tile.out = out;
  while (num_ranks >= kRanks) {
    dot_tile<Weights, kRows, kRanks>(tile, weight);
    for (int row = 0; row < kRows; ++row) out[row] += kRanks;
    tile.scales += kRanks;
    weight += kRanks * kLanes;
    num_ranks -= kRanks;
  }
  if constexpr (kRanks > 1) {
    if (num_ranks > 0) dot_ranks<Weights, kRows, kRanks - 1>(tile, num_ranks, weight);
  }
}

template <class Weights, int kRows = kShrinkRows>
void dot_rows(const LoraArgs& args, const LoraGroup& group, int64_t panel, int64_t begin, int64_t end) {
  const int64_t first_rank = panel * kLoraPanelRanks;
  const int64_t height = smaller(kLoraPanelRanks, group.rank - first_rank);
  const int64_t padded = divide_up(args.in_features, kLanes) * kLanes;
  const auto* weight = static_cast<const typename Weights::Element*>(group.a) + first_rank * padded;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) {
    const float* x[kRows];
    float* out[kRows];
    for (int i = 0; i < kRows; ++i) {
      x[i] = args.x + group.row_ids[row + i] * args.x_stride;
      out[i] = group.shrunk + (row + i) * group.rank + first_rank;
    }
    dot_ranks<Weights, kRows>({x, out, group.scales + first_rank, args.in_features, height}, height, weight);
  }
  if constexpr (kRows > 1) {
    if (row < end) dot_rows<Weights, kRows - 1>(args, group, panel, row, end);
  }
}

// --- (x A^T) B^T

template <class Weights, int kRows = kExpandRows>
void expand_rows(const LoraArgs& args, const LoraGroup& group, const LoraPart& part, int64_t panel,
                 int64_t begin, int64_t end) {
  const auto* weight = static_cast<const typename Weights::Element*>(part.b) + panel * part.rank * kLanes;
  const int64_t column = panel * kLanes, left = smaller(part.num_columns - column, kLanes);
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) {
    const float* shrunk = group.shrunk + row * group.rank + part.first_rank;
    Vec16 sums[kRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = zero();
    for (int64_t rank = 0; rank < part.rank; ++rank) {
      Vec16 b[2];
      Weights::load_lanes(weight + rank * kLanes, b[0], b[1]);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec16 value = set1(shrunk[i * group.rank + rank]);
        sums[i][0] = fma(value, b[0], sums[i][0]);
        sums[i][1] = fma(value, b[1], sums[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      float* out = args.out + group.row_ids[row + i] * args.out_stride + part.first_column + column;
      if (left == kLanes) {
        store(out, add(load(out), sums[i][0]));
        store(out + 16, add(load(out + 16), sums[i][1]));
        continue;
      }
      const int64_t low = smaller(left, 16), high = left - low;
      store_first(out, add(load_first(out, low), sums[i][0]), low);
      if (high > 0) store_first(out + 16, add(load_first(out + 16, high), sums[i][1]), high);
    }
  }
  if constexpr (kRows > 1) {
    if (row < end) expand_rows<Weights, kRows - 1>(args, group, part, panel, row, end);
  }
}

template <class Weights>
void look_up(const LoraArgs& args, const LoraGroup& group, int64_t row) {
  const int64_t id = args.token_ids[group.row_ids[row]];
  const auto* weight = static_cast<const typename Weights::Element*>(group.a) + id * group.rank;
  float* out = group.shrunk + row * group.rank;
  for (int64_t rank = 0; rank < group.rank; ++rank)
    out[rank] = Weights::value(weight[rank]) * group.scales[rank];
}

// The rows of block `block` of a group.
struct Block {
  int64_t begin, end;
};
ENGINE_INLINE Block rows_of(const LoraGroup& group, int64_t block) {
  const int64_t begin = block * kLoraBlockRows;
  return {begin, smaller(begin + kLoraBlockRows, group.num_rows)};
}

}  // namespace

void lora_shrink(const LoraArgs& args, int64_t begin, int64_t end) {
  const LoraGroup* group = args.groups;
  for (int64_t item = begin; item < end; ++item) {
    while (group + 1 < args.groups + args.num_groups && group[1].first_shrink_item <= item) ++group;
    const int64_t num_panels = divide_up(group->rank, kLoraPanelRanks);
    const int64_t index = item - group->first_shrink_item;
    const Block rows = rows_of(*group, index / num_panels);
    if (group->format == WeightFormat::kFloat32) {
      dot_rows<Fp32Weights>(args, *group, index % num_panels, rows.begin, rows.end);
    } else {
      dot_rows<Bf16Weights>(args, *group, index % num_panels, rows.begin, rows.end);
    }
  }
}

void lora_lookup(const LoraArgs& args, int64_t begin, int64_t end) {
  const LoraGroup* group = args.groups;
  for (int64_t item = begin; item < end; ++item) {
    while (group + 1 < args.groups + args.num_groups && group[1].first_shrink_item <= item) ++group;
    if (group->format == WeightFormat::kFloat32) {
      look_up<Fp32Weights>(args, *group, item - group->first_shrink_item);
    } else {
      look_up<Bf16Weights>(args, *group, item - group->first_shrink_item);
    }
  }
}

void lora_expand(const LoraArgs& args, int64_t begin, int64_t end) {
  const LoraGroup* group = args.groups;
  for (int64_t item = begin; item < end; ++item) {
    while (group + 1 < args.groups + args.num_groups && group[1].first_expand_item <= item) ++group;
    int64_t num_panels = 0;
    for (int64_t i = 0; i < group->num_parts; ++i) num_panels += divide_up(group->parts[i].num_columns, kLanes);
    const int64_t index = item - group->first_expand_item;
    int64_t panel = index % num_panels;
    const LoraPart* part = group->parts;
    while (panel >= divide_up(part->num_columns, kLanes)) panel -= divide_up((part++)->num_columns, kLanes);
    const Block rows = rows_of(*group, index / num_panels);
    if (group->format == WeightFormat::kFloat32) {
      expand_rows<Fp32Weights>(args, *group, *part, panel, rows.begin, rows.end);
    } else {
      expand_rows<Bf16Weights>(args, *group, *part, panel, rows.begin, rows.end);
    }
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
