// out = x W^T + bias, every output element in the order of sums that promise P1 rests on
// (docs/decisions/0001-order-of-sums.md): chains of fma over 256 consecutive k, each from zero, their
// results added in order of k, the bias last. Lanes run along the outputs, so neither the tile
// sizes below nor the vector width touch that order.
//
// One way for one row and for thousands: a panel's next 256 k are read from memory by the first tile
// of rows and stay in the first-level cache for the others.
#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kChain = 256;

// A tile keeps rows x vectors of accumulators in registers: with more than kWideRows rows it takes
// the two vectors of a panel one after the other.
#if ENGINE_ISA_avx512
constexpr int64_t kTileRows = 12, kWideRows = 12;
#elif ENGINE_ISA_avx2
constexpr int64_t kTileRows = 6, kWideRows = 2;
#elif ENGINE_ISA_neon
constexpr int64_t kTileRows = 6, kWideRows = 2;
#else
constexpr int64_t kTileRows = 2, kWideRows = 1;
#endif

// Far enough ahead for the memory to keep up, near enough to be still cached when its turn comes.
constexpr int64_t kPrefetchBytes = 4096;

struct Bf16Weights {
  using Element = uint16_t;
  ENGINE_INLINE void load_columns(const Element* p, Vec16& low, Vec16& high) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);
    load_bf16_pairs(p, low, high);
  }
};

struct Fp32Weights {
  using Element = float;
  ENGINE_INLINE void load_columns(const Element* p, Vec16& low, Vec16& high) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes + 64);
    low = load(p);
    high = load(p + 16);
  }
};

// One chain of every output of a tile: some rows, one panel, `num_k` steps from `first_k` on.
struct Tile {
  const float* x;     // first row, at first_k
  float* out;         // first row, first column of the panel
  const float* bias;  // of the panel, or null
  int64_t x_stride, out_stride;
  int64_t num_k;
  int64_t num_columns;  // up to 32
  bool is_first, is_last;
};

ENGINE_INLINE void add_chain(const Tile& tile, float* out, int64_t column, Vec16 sum) {
  const int64_t left = tile.num_columns - column;
  const int64_t n = left < 0 ? 0 : left < 16 ? left : 16;
  if (!tile.is_first) sum = add(load_first(out + column, n), sum);
  if (tile.is_last && tile.bias != nullptr) sum = add(sum, load_first(tile.bias + column, n));
  store_first(out + column, sum, n);
}

// kVecs vectors of 16 columns from vector kFirst on.
template <class Weights, int kRows, int kFirst, int kVecs>
void run_vectors(const Tile& tile, const typename Weights::Element* weight) {
  Vec16 sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int vec = 0; vec < kVecs; ++vec) sums[row][vec] = zero();
  }
  const float* x = tile.x;
  const int64_t x_stride = tile.x_stride;
  for (int64_t k = 0; k < tile.num_k; ++k) {
    Vec16 columns[2];
    Weights::load_columns(weight + k * kPanelColumns, columns[0], columns[1]);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vec16 value = set1(x[row * x_stride + k]);
#pragma GCC unroll 2
      for (int vec = 0; vec < kVecs; ++vec) sums[row][vec] = fma(value, columns[kFirst + vec], sums[row][vec]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int vec = 0; vec < kVecs; ++vec) {
      add_chain(tile, tile.out + row * tile.out_stride, (kFirst + vec) * 16, sums[row][vec]);
    }
  }
}

template <class Weights, int kRows = kTileRows>
void run_tile(const Tile& tile, int64_t num_rows, const typename Weights::Element* weight) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) return run_tile<Weights, kRows - 1>(tile, num_rows, weight);
  }
  if constexpr (kRows <= kWideRows) {
    run_vectors<Weights, kRows, 0, 2>(tile, weight);
  } else {
    run_vectors<Weights, kRows, 0, 1>(tile, weight);
    run_vectors<Weights, kRows, 1, 1>(tile, weight);
  }
}

// Spreads the rows evenly over the tiles, so that none is left with a single row.
template <class Weights>
void run_tiles(Tile tile, int64_t num_rows, const typename Weights::Element* weight) {
  for (int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows; num_tiles > 0; --num_tiles) {
    const int64_t rows = (num_rows + num_tiles - 1) / num_tiles;
    run_tile<Weights>(tile, rows, weight);
    tile.x += rows * tile.x_stride;
    tile.out += rows * tile.out_stride;
    num_rows -= rows;
  }
}

void run_panel(const LinearArgs& args, int64_t panel, int64_t first_row, int64_t num_rows) {
  const int64_t column = panel * kPanelColumns;
  Tile tile;
  tile.out = args.is_out_of_item ? args.out : args.out + first_row * args.out_stride + column;
  tile.bias = args.bias != nullptr ? args.bias + column : nullptr;
  tile.x_stride = args.x_stride;
  tile.out_stride = args.out_stride;
  tile.num_columns = args.out_features - column;
  for (int64_t k = 0; k < args.in_features; k += kChain) {
    const int64_t left = args.in_features - k;
    tile.x = args.x + first_row * args.x_stride + k;
    tile.num_k = left < kChain ? left : kChain;
    tile.is_first = k == 0;
    tile.is_last = left <= kChain;
    const int64_t offset = (panel * args.in_features + k) * kPanelColumns;
    if (args.format == WeightFormat::kFloat32) {
      run_tiles<Fp32Weights>(tile, num_rows, static_cast<const float*>(args.weight) + offset);
    } else {
      run_tiles<Bf16Weights>(tile, num_rows, static_cast<const uint16_t*>(args.weight) + offset);
    }
  }
}

}  // namespace

void linear(const LinearArgs& args, int64_t begin, int64_t end) {
  const int64_t num_panels = (args.out_features + kPanelColumns - 1) / kPanelColumns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_row = item / num_panels * args.rows_per_block;
    const int64_t left = args.num_rows - first_row;
    run_panel(args, item % num_panels, first_row, left < args.rows_per_block ? left : args.rows_per_block);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
