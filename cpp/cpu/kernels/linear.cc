// out = x W^T + bias, every output element in the order of sums that promise P1 rests on
// (docs/decisions/0001-order-of-sums.md): chains of fma over 256 consecutive k, each from zero, their
// results added in order of k, the bias last. Lanes run along the outputs, so neither the tile
// sizes below nor the vector width touch that order.
//
// Where weights and activations are both bfloat16 (kBFloat16Dot), two k are one step: their products are added
// to a chain by the machine's instruction for that, or, where it has none, one after the other.
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
// The first of several tiles of rows also asks for what comes while the others multiply.
constexpr int64_t kLoneTilePrefetchBytes = 8192, kPrefetchBytes = 12288;

// The cache that is asked to hold it: the first where reading takes longer, the second where multiplying does,
// since the first has few places for lines on their way, and loads wait for one.
template <class Weights, int kRows>
constexpr int kPrefetchLevel = kRows < 3 * Weights::kStepLines ? 3 : 2;

// How operands are read and multiplied, kStep of k, which are kStepLines cache lines, at a time. Operand holds
// the factors of 16 columns, or one of the activations for all of them. kLevel as of __builtin_prefetch.
struct Bf16Weights {
  using Element = uint16_t;
  using Input = float;
  using Operand = Vec16;
  static constexpr int64_t kStep = 1, kStepLines = 1;
  template <int kLevel>
  ENGINE_INLINE void load_columns(const Element* p, int64_t prefetch_bytes, Operand& low, Operand& high) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + prefetch_bytes, 0, kLevel);
    load_bf16_pairs(p, low, high);
  }
  ENGINE_INLINE Operand load_input(const Input* x) { return set1(*x); }
  ENGINE_INLINE Vec16 add_product(Operand value, Operand columns, Vec16 sum) {
    return fma(value, columns, sum);
  }
};

struct Fp32Weights {
  using Element = float;
  using Input = float;
  using Operand = Vec16;
  static constexpr int64_t kStep = 1, kStepLines = 2;
  template <int kLevel>
  ENGINE_INLINE void load_columns(const Element* p, int64_t prefetch_bytes, Operand& low, Operand& high) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + prefetch_bytes, 0, kLevel);
    __builtin_prefetch(reinterpret_cast<const char*>(p) + prefetch_bytes + 64, 0, kLevel);
    low = load(p);
    high = load(p + 16);
  }
  ENGINE_INLINE Operand load_input(const Input* x) { return set1(*x); }
  ENGINE_INLINE Vec16 add_product(Operand value, Operand columns, Vec16 sum) {
    return fma(value, columns, sum);
  }
};

// Any machine: the pair is widened and added k by k.
struct WidenedPairs {
  using Element = uint16_t;
  using Input = uint16_t;
  struct Operand {
    Vec16 first, second;
  };
  static constexpr int64_t kStep = 2, kStepLines = 2;
  template <int kLevel>
  ENGINE_INLINE void load_columns(const Element* p, int64_t prefetch_bytes, Operand& low, Operand& high) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + prefetch_bytes, 0, kLevel);
    __builtin_prefetch(reinterpret_cast<const char*>(p) + prefetch_bytes + 64, 0, kLevel);
    load_bf16_pairs(p, low.first, high.first);
    load_bf16_pairs(p + kPanelColumns, low.second, high.second);
  }
  ENGINE_INLINE void load_last_columns(const Element* p, Operand& low, Operand& high) {
    load_bf16_pairs(p, low.first, high.first);
    low.second = high.second = zero();
  }
  ENGINE_INLINE Operand load_input(const Input* x) { return {widened(x[0]), widened(x[1])}; }
  ENGINE_INLINE Vec16 add_product(const Operand& value, const Operand& columns, Vec16 sum) {
    return fma(value.second, columns.second, fma(value.first, columns.first, sum));
  }

 private:
  ENGINE_INLINE Vec16 widened(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return set1(value);
  }
};

#if ENGINE_ISA_avx512
// Machines with vdpbf16ps, whatever else they have, so that it is written down rather than compiled for.
struct DotPairs {
  using Element = uint16_t;
  using Input = uint16_t;
  using Operand = __m512i;
  static constexpr int64_t kStep = 2, kStepLines = 2;
  template <int kLevel>
  ENGINE_INLINE void load_columns(const Element* p, int64_t prefetch_bytes, Operand& low, Operand& high) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + prefetch_bytes, 0, kLevel);
    __builtin_prefetch(reinterpret_cast<const char*>(p) + prefetch_bytes + 64, 0, kLevel);
    join(_mm512_loadu_si512(p), _mm512_loadu_si512(p + kPanelColumns), low, high);
  }
  ENGINE_INLINE void load_last_columns(const Element* p, Operand& low, Operand& high) {
    join(_mm512_loadu_si512(p), _mm512_setzero_si512(), low, high);
  }
  ENGINE_INLINE Operand load_input(const Input* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  ENGINE_INLINE Vec16 add_product(Operand value, Operand columns, Vec16 sum) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(columns), "v"(value));
    return sum;
  }

 private:
  // Columns i and 16 + i of one k are neighbours; of each column the two k shall be.
  ENGINE_INLINE void join(__m512i first, __m512i second, Operand& low, Operand& high) {
    constexpr __mmask32 kSecond = 0xaaaaaaaau;
    low = _mm512_mask_blend_epi16(kSecond, first, _mm512_slli_epi32(second, 16));
    high = _mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(first, 16), second);
  }
};
#endif

// One chain of every output of a tile: some rows, one panel, `num_k` steps from `first_k` on.
template <class Input>
struct Tile {
  const Input* x;     // first row, at first_k
  float* out;         // first row, first column of the panel
  const float* bias;  // of the panel, or null
  int64_t x_stride, out_stride;
  int64_t num_k;
  int64_t num_columns;  // up to 32
  int64_t prefetch_bytes;
  bool is_first, is_last;
};

template <class Input>
ENGINE_INLINE void add_chain(const Tile<Input>& tile, float* out, int64_t column, Vec16 sum) {
  const int64_t left = tile.num_columns - column;
  const int64_t n = left < 0 ? 0 : left < 16 ? left : 16;
  if (!tile.is_first) sum = add(load_first(out + column, n), sum);
  if (tile.is_last && tile.bias != nullptr) sum = add(sum, load_first(tile.bias + column, n));
  store_first(out + column, sum, n);
}

// One step of k in all rows of a tile.
template <class Weights, int kRows, int kVecs>
ENGINE_INLINE void add_step(const typename Weights::Operand* columns, const typename Weights::Input* x,
                            int64_t x_stride, Vec16 (*sums)[kVecs]) {
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    const typename Weights::Operand value = Weights::load_input(x + row * x_stride);
#pragma GCC unroll 2
    for (int vec = 0; vec < kVecs; ++vec) {
      sums[row][vec] = Weights::add_product(value, columns[vec], sums[row][vec]);
    }
  }
}

// kVecs vectors of 16 columns from vector kFirst on.
template <class Weights, int kRows, int kFirst, int kVecs>
void run_vectors(const Tile<typename Weights::Input>& tile, const typename Weights::Element* weight) {
  Vec16 sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int vec = 0; vec < kVecs; ++vec) sums[row][vec] = zero();
  }
  constexpr int64_t kStep = Weights::kStep;
  typename Weights::Operand columns[2];
  const int64_t num_k = tile.num_k / kStep * kStep, prefetch_bytes = tile.prefetch_bytes;
  for (int64_t k = 0; k < num_k; k += kStep) {
    Weights::template load_columns<kPrefetchLevel<Weights, kRows>>(weight + k * kPanelColumns, prefetch_bytes,
                                                                   columns[0], columns[1]);
    add_step<Weights, kRows, kVecs>(columns + kFirst, tile.x + k, tile.x_stride, sums);
  }
  if constexpr (kStep > 1) {
    if (num_k < tile.num_k) {
      Weights::load_last_columns(weight + num_k * kPanelColumns, columns[0], columns[1]);
      add_step<Weights, kRows, kVecs>(columns + kFirst, tile.x + num_k, tile.x_stride, sums);
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
void run_tile(const Tile<typename Weights::Input>& tile, int64_t num_rows,
              const typename Weights::Element* weight) {
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
void run_tiles(Tile<typename Weights::Input> tile, int64_t num_rows, const typename Weights::Element* weight) {
  tile.prefetch_bytes = num_rows <= kTileRows ? kLoneTilePrefetchBytes : kPrefetchBytes;
  for (int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows; num_tiles > 0; --num_tiles) {
    const int64_t rows = (num_rows + num_tiles - 1) / num_tiles;
    run_tile<Weights>(tile, rows, weight);
    tile.x += rows * tile.x_stride;
    tile.out += rows * tile.out_stride;
    num_rows -= rows;
  }
}

template <class Weights>
void run_panel(const LinearArgs& args, int64_t panel, int64_t first_row, int64_t num_rows) {
  const int64_t column = panel * kPanelColumns;
  Tile<typename Weights::Input> tile;
  tile.out = args.is_out_of_item ? args.out : args.out + first_row * args.out_stride + column;
  tile.bias = args.bias != nullptr ? args.bias + column : nullptr;
  tile.x_stride = args.x_stride;
  tile.out_stride = args.out_stride;
  tile.num_columns = args.out_features - column;
  for (int64_t k = 0; k < args.in_features; k += kChain) {
    const int64_t left = args.in_features - k;
    tile.x = static_cast<const typename Weights::Input*>(args.x) + first_row * args.x_stride + k;
    tile.num_k = left < kChain ? left : kChain;
    tile.is_first = k == 0;
    tile.is_last = left <= kChain;
    const int64_t offset = (panel * args.in_features + k) * kPanelColumns;
    run_tiles<Weights>(tile, num_rows, static_cast<const typename Weights::Element*>(args.weight) + offset);
  }
}

template <class Weights>
void run_items(const LinearArgs& args, int64_t begin, int64_t end) {
  const int64_t num_panels = (args.out_features + kPanelColumns - 1) / kPanelColumns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_row = item / num_panels * args.rows_per_block;
    const int64_t left = args.num_rows - first_row;
    const int64_t num_rows = left < args.rows_per_block ? left : args.rows_per_block;
    run_panel<Weights>(args, item % num_panels, first_row, num_rows);
  }
}

}  // namespace

void linear(const LinearArgs& args, int64_t begin, int64_t end) {
  switch (args.format) {
    case WeightFormat::kFloat32: return run_items<Fp32Weights>(args, begin, end);
    case WeightFormat::kBFloat16Dot:
#if ENGINE_ISA_avx512
      if (args.has_bf16_dot) return run_items<DotPairs>(args, begin, end);
#endif
      return run_items<WidenedPairs>(args, begin, end);
    default: return run_items<Bf16Weights>(args, begin, end);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
