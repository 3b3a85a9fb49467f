// out = x W^T + bias for 8-bit and 4-bit weights and activations that were quantised by quantize_rows.
//
// The order of sums (docs/decisions/0007-quantised-weights.md): products within a group of the weights are
// added as int32, exactly; groups are added in order of k by fma in fp32, those of 32 first to the others that
// share a scale of the activations; after every kQuantizedChain k come the outliers of these k, in order; the
// bias last. A row's bits depend on nothing else.
#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

// A tile keeps rows x vectors of both int32 and fp32 sums in registers: with more than kWideRows rows
// it takes the two vectors of a panel one after the other. Where several groups share a scale of the
// activations, what they add up to is in registers, and with more than kFineRows rows the fp32 sums are in
// memory.
#if ENGINE_ISA_avx512
constexpr int kTileRows = 6, kWideRows = 6, kFineRows = 4;
#elif ENGINE_ISA_avx2 || ENGINE_ISA_neon
constexpr int kTileRows = 3, kWideRows = 1, kFineRows = 1;
#else
constexpr int kTileRows = 2, kWideRows = 1, kFineRows = 1;
#endif
// With more rows of int8 than this there are two tiles at least: a lone one asks for so much at once that it
// waits for memory.
constexpr int kLoneRows = kTileRows < 4 ? kTileRows : 4;

constexpr int64_t kPrefetchBytes = 8192;

ENGINE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ENGINE_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int64_t kLen>
struct Int8Weights {
  static constexpr int64_t kGroupLen = kLen;
  static constexpr WeightFormat kFormat = WeightFormat::kInt8;
  static constexpr bool kIsAffine = false;
  static constexpr int kMostLoneRows = kLoneRows;
  // Four k of 16 columns, then the next four of the same columns.
  ENGINE_INLINE void load_step(const uint8_t* p, int vec, Bytes64& first, Bytes64& second) {
    first = load_bytes(p + vec * 64);
    second = load_bytes(p + 128 + vec * 64);
  }
  ENGINE_INLINE Vec16 load_scales(const uint8_t* p, int vec) {
    return load(reinterpret_cast<const float*>(p) + vec * 16);
  }
};

template <int64_t kLen>
struct Int4Weights {
  static constexpr int64_t kGroupLen = kLen;
  static constexpr WeightFormat kFormat = WeightFormat::kInt4;
  static constexpr bool kIsAffine = false;
  static constexpr int kMostLoneRows = kTileRows;
  ENGINE_INLINE void load_step(const uint8_t* p, int vec, Bytes64& first, Bytes64& second) {
    const Bytes64 both = load_bytes(p + vec * 64);
    first = low_nibbles(both);
    second = high_nibbles(both);
  }
  ENGINE_INLINE Vec16 load_scales(const uint8_t* p, int vec) {
    return load_fp16(reinterpret_cast<const uint16_t*>(p) + vec * 16);
  }
};

template <int64_t kLen>
struct Int4AffineWeights : Int4Weights<kLen> {
  static constexpr WeightFormat kFormat = WeightFormat::kInt4Affine;
  static constexpr bool kIsAffine = true;
  ENGINE_INLINE Vec16 load_scales(const uint8_t* p, int vec) {
    return load(reinterpret_cast<const float*>(p) + vec * 16);
  }
  ENGINE_INLINE Vec16 load_offsets(const uint8_t* p, int vec) {
    return load(reinterpret_cast<const float*>(p) + kPanelColumns + vec * 16);
  }
};

// Some rows against one panel for up to kQuantizedChain k.
struct Tile {
  const int8_t* codes;     // first row, first k
  const float* scales;     // of the activations: first row, first group
  const int32_t* offsets;  // the same
  int64_t codes_stride, row_stride;
  const uint8_t* weight;  // the panel's first group
  PanelLayout layout;
  int64_t num_k;
  float* sums;  // first row
  int64_t sums_stride;
  bool is_first;
  const float* out;  // first row, where results will go soon; or null
  int64_t out_stride;
  int64_t prefetch_bytes;      // how far ahead steps prefetch
  const uint8_t* group_lines;  // what groups prefetch, some lines each
  int64_t num_group_lines;
};

// Cache lines of a step.
template <class Weights>
constexpr int kStepLines = static_cast<int>(panel_layout(Weights::kFormat, 32).step_bytes / 64);

// Adds the products of kWeightStep k.
template <class Weights, int kRows, int kFirst, int kVecs, int kLines>
ENGINE_INLINE void add_step(const uint8_t* weight, const int8_t* codes, int64_t codes_stride,
                            int64_t prefetch_bytes, Sums16 (&dots)[kRows][kVecs]) {
  Weights64 first[kVecs], second[kVecs];
#pragma GCC unroll 2
  for (int vec = 0; vec < kVecs; ++vec) {
    Bytes64 low, high;
    Weights::load_step(weight, kFirst + vec, low, high);
    first[vec] = as_weights(low);
    second[vec] = as_weights(high);
  }
#pragma GCC unroll 4
  for (int line = 0; line < kLines; ++line) {
    // Beside what all tiles use now, the first-level cache may not hold what they will use next.
    constexpr int kLevel = kLines == kStepLines<Weights> ? 3 : 2;
    __builtin_prefetch(weight + prefetch_bytes + line * 64, 0, kLevel);
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
    const Inputs4 x = load_inputs(codes + row * codes_stride);
#pragma GCC unroll 2
    for (int vec = 0; vec < kVecs; ++vec) dots[row][vec] = dot(dots[row][vec], first[vec], x);
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
    const Inputs4 x = load_inputs(codes + row * codes_stride + 4);
#pragma GCC unroll 2
    for (int vec = 0; vec < kVecs; ++vec) dots[row][vec] = dot(dots[row][vec], second[vec], x);
  }
}

// Adds the dot products of a group times its weights' scales.
template <class Weights, int kRows, int kFirst, int kVecs>
ENGINE_INLINE void add_group(const uint8_t* weight_scales, const int32_t* offsets, Sums16 (&dots)[kRows][kVecs],
                             Vec16 (&parts)[kRows][kVecs]) {
#pragma GCC unroll 2
  for (int vec = 0; vec < kVecs; ++vec) {
    const Vec16 scale = Weights::load_scales(weight_scales, kFirst + vec);
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row)
      parts[row][vec] = fma(to_float(dots[row][vec]), scale, parts[row][vec]);
    if constexpr (Weights::kIsAffine) {
      const Vec16 offset = Weights::load_offsets(weight_scales, kFirst + vec);
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
        parts[row][vec] = fma(set1(static_cast<float>(offsets[row])), offset, parts[row][vec]);
      }
    }
  }
}

template <int kRows, int kVecs>
ENGINE_INLINE void clear(Vec16 (&sums)[kRows][kVecs]) {
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int vec = 0; vec < kVecs; ++vec) sums[row][vec] = zero();
  }
}

// kVecs vectors of 16 columns from vector kFirst on; a step prefetches kLines cache lines of weights.
template <class Weights, int kRows, int kFirst, int kVecs, int kLines>
void run_vectors(const Tile& tile) {
  constexpr int64_t kStepBytes = panel_layout(Weights::kFormat, 32).step_bytes;
  if (tile.out != nullptr) {
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
      for (int vec = 0; vec < kVecs; ++vec) {
        __builtin_prefetch(tile.out + row * tile.out_stride + (kFirst + vec) * 16, 1);
      }
    }
  }
  constexpr bool kIsFine = Weights::kGroupLen < kActivationGroup;
  constexpr bool kKeepsSums = !kIsFine || kRows <= kFineRows;
  float* const kept = tile.sums + kFirst * 16;
  const int64_t sums_stride = tile.sums_stride;
  Vec16 sums[kRows][kVecs];
  if (kKeepsSums || tile.is_first) {
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
      for (int vec = 0; vec < kVecs; ++vec) {
        sums[row][vec] = tile.is_first ? zero() : load(kept + row * sums_stride + vec * 16);
        if constexpr (!kKeepsSums) store(kept + row * sums_stride + vec * 16, zero());
      }
    }
  }
  const int64_t codes_stride = tile.codes_stride, prefetch_bytes = tile.prefetch_bytes;
  const uint8_t* weight = tile.weight;
  const uint8_t* group_lines = tile.group_lines;
  const int8_t* codes = tile.codes;
  const float* scales = tile.scales;
  const int32_t* offsets = tile.offsets;
  for (int64_t k = 0; k < tile.num_k;) {
    Vec16 parts[kRows][kVecs];
    if constexpr (kIsFine) clear(parts);
    const int64_t end_k = least(k + kActivationGroup, tile.num_k);
    do {
      for (int64_t line = 0; line < tile.num_group_lines; ++line, group_lines += 64)
        __builtin_prefetch(group_lines);
      const uint8_t* weight_scales = weight;
      weight += tile.layout.scale_bytes;
      Sums16 dots[kRows][kVecs];
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
        for (int vec = 0; vec < kVecs; ++vec) dots[row][vec] = all_sums(Weights::kIsAffine ? 0 : offsets[row]);
      }
      const int64_t num_steps = divide_up(least(end_k - k, Weights::kGroupLen), kWeightStep);
      const uint8_t* const end = weight + num_steps * kStepBytes;
      for (; weight != end; weight += kStepBytes, codes += kWeightStep) {
        add_step<Weights, kRows, kFirst, kVecs, kLines>(weight, codes, codes_stride, prefetch_bytes, dots);
      }
      if constexpr (kIsFine) {
        add_group<Weights, kRows, kFirst, kVecs>(weight_scales, offsets, dots, parts);
      } else {
        Vec16 weight_scale[kVecs];
#pragma GCC unroll 2
        for (int vec = 0; vec < kVecs; ++vec)
          weight_scale[vec] = Weights::load_scales(weight_scales, kFirst + vec);
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
          const Vec16 scale = set1(scales[row]);
#pragma GCC unroll 2
          for (int vec = 0; vec < kVecs; ++vec) {
            Vec16& sum = sums[row][vec];
            sum = fma(to_float(dots[row][vec]), mul(weight_scale[vec], scale), sum);
            if constexpr (Weights::kIsAffine) {
              const Vec16 input_sum = mul(set1(static_cast<float>(offsets[row])), scale);
              sum = fma(input_sum, Weights::load_offsets(weight_scales, kFirst + vec), sum);
            }
          }
        }
      }
      offsets += tile.row_stride;
      k += Weights::kGroupLen;
    } while (kIsFine && k < end_k);
    if constexpr (kIsFine) {
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
        const Vec16 scale = set1(scales[row]);
#pragma GCC unroll 2
        for (int vec = 0; vec < kVecs; ++vec) {
          float* const in_memory = kept + row * sums_stride + vec * 16;
          sums[row][vec] = fma(parts[row][vec], scale, kKeepsSums ? sums[row][vec] : load(in_memory));
          if constexpr (!kKeepsSums) store(in_memory, sums[row][vec]);
        }
      }
    }
    scales += tile.row_stride;
  }
  if constexpr (kKeepsSums) {
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
      for (int vec = 0; vec < kVecs; ++vec) store(kept + row * sums_stride + vec * 16, sums[row][vec]);
    }
  }
}

template <class Weights, int kLines, int kRows>
void run_tile(const Tile& tile, int64_t num_rows) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) return run_tile<Weights, kLines, kRows - 1>(tile, num_rows);
  }
  if constexpr (kRows <= kWideRows) {
    run_vectors<Weights, kRows, 0, 2, kLines>(tile);
  } else {
    run_vectors<Weights, kRows, 0, 1, kLines>(tile);
    run_vectors<Weights, kRows, 1, 1, kLines>(tile);
  }
}

// Spreads the rows evenly over the tiles, so that none is left with a single row. A lone tile prefetches what
// it will need soon; several share what comes kQuantizedChain k later, so that none waits for memory while the
// others leave it idle.
template <class Weights>
void run_tiles(Tile tile, int64_t num_rows) {
  constexpr int kLines = kStepLines<Weights>;
  int64_t num_tiles = divide_up(num_rows, kTileRows);
  if (num_tiles == 1 && num_rows > Weights::kMostLoneRows) num_tiles = 2;
  const int64_t chain_bytes = panel_bytes(tile.layout, kQuantizedChain);
  const int64_t this_bytes = panel_bytes(tile.layout, tile.num_k);
  const int64_t num_groups = divide_up(tile.num_k, tile.layout.group_len);
  for (int64_t index = 0; index < num_tiles; ++index) {
    const int64_t rows = divide_up(num_rows, num_tiles - index);
    // One call of each kind, that of no lines above all: so the compiler makes them part of this loop, and many
    // rows do not wait for calls.
    int64_t num_lines = 0;
    tile.num_group_lines = 0;
    if (num_tiles == 1) {
      tile.prefetch_bytes = kPrefetchBytes;
      num_lines = kLines;
    } else if (num_tiles <= kLines + 1) {
      // Some lines of every step: all of a few steps would be more than the memory takes at once.
      const int64_t first = kLines * index / num_tiles;
      tile.prefetch_bytes = chain_bytes + first * 64;
      num_lines = kLines * (index + 1) / num_tiles - first;
    } else {
      tile.num_group_lines = divide_up(chain_bytes / 64, num_tiles * num_groups);
      tile.group_lines = tile.weight + this_bytes + index * num_groups * tile.num_group_lines * 64;
    }
    if (num_lines == 0) {
      run_tile<Weights, 0, kTileRows>(tile, rows);
    } else if (num_lines == kLines) {
      run_tile<Weights, kLines, Weights::kMostLoneRows>(tile, rows);
    } else if (num_lines == 1) {
      run_tile<Weights, 1, kTileRows>(tile, rows);
    } else {
      run_tile<Weights, kLines / 2, kTileRows>(tile, rows);
    }
    tile.codes += rows * tile.codes_stride;
    tile.scales += rows;
    tile.offsets += rows;
    tile.sums += rows * tile.sums_stride;
    if (tile.out != nullptr) tile.out += rows * tile.out_stride;
    num_rows -= rows;
  }
}

// Adds x[k] times the weights of k, for all columns.
template <class Weights>
ENGINE_INLINE void add_outlier(const Tile& tile, int64_t k, float x, float* sums) {
  const int64_t group_bytes = panel_bytes(tile.layout, tile.layout.group_len);
  const uint8_t* group = tile.weight + k / tile.layout.group_len * group_bytes;
  const int64_t step = k % tile.layout.group_len / kWeightStep;
  for (int vec = 0; vec < 2; ++vec) {
    Bytes64 first, second;
    Weights::load_step(group + tile.layout.scale_bytes + step * tile.layout.step_bytes, vec, first, second);
    const Sums16 codes = byte_of(k % kWeightStep < 4 ? first : second, static_cast<int>(k % 4));
    Vec16 weight;
    if constexpr (Weights::kIsAffine) {
      weight = fma(to_float(codes), Weights::load_scales(group, vec), Weights::load_offsets(group, vec));
    } else {
      const Vec16 zero_codes = set1(static_cast<float>(zero_code(Weights::kFormat)));
      weight = mul(sub(to_float(codes), zero_codes), Weights::load_scales(group, vec));
    }
    store(sums + vec * 16, fma(set1(x), weight, load(sums + vec * 16)));
  }
}

// Of one row, the outliers among the `tile.num_k` from k on.
template <class Weights>
void add_row_outliers(const QuantizedLinearArgs& args, const Tile& tile, int64_t row, int64_t k, float* sums) {
  const uint64_t* outliers = args.rows.outliers + (row * args.rows.padded_k + k) / 64;
  for (int64_t word = 0; word * 64 < tile.num_k; ++word) {
    for (uint64_t bits = outliers[word]; bits != 0; bits &= bits - 1) {
      const int64_t at = word * 64 + __builtin_ctzll(bits);
      const float x = args.x[row * args.x_stride + k + at];
      add_outlier<Weights>(tile, at, args.column_scales == nullptr ? x : x * args.column_scales[k + at], sums);
    }
  }
}

// Few rows have any, so eight are looked at together.
template <class Weights>
void add_outliers(const QuantizedLinearArgs& args, const Tile& tile, int64_t first_row, int64_t num_rows,
                  int64_t k) {
  const uint8_t* flags = args.rows.has_outliers + k / kActivationGroup * args.rows.row_stride + first_row;
  for (int64_t row = 0; row < num_rows; row += 8) {
    uint64_t any = 0;
    for (int64_t group = 0; group * kActivationGroup < tile.num_k; ++group) {
      uint64_t eight;
      __builtin_memcpy(&eight, flags + group * args.rows.row_stride + row, sizeof(eight));
      any |= eight;
    }
    if (any == 0) continue;
    for (int64_t i = row; i < least(row + 8, num_rows); ++i) {
      add_row_outliers<Weights>(args, tile, first_row + i, k, tile.sums + i * tile.sums_stride);
    }
  }
}

// To where the results belong, if they are not there yet, with the bias.
ENGINE_INLINE void finish(const QuantizedLinearArgs& args, int64_t first_row, int64_t num_rows, int64_t column,
                          const float* sums, int64_t sums_stride) {
  float* first = args.is_out_of_item ? args.out : args.out + first_row * args.out_stride + column;
  if (first == sums && args.bias == nullptr) return;
  for (int64_t from = 0; from < kPanelColumns && column + from < args.out_features; from += 16) {
    const int64_t left = args.out_features - column - from;
    const int64_t n = left < 16 ? left : 16;
    float* out = first + from;
    const float* sum = sums + from;
    if (args.bias == nullptr) {
      for (int64_t row = 0; row < num_rows; ++row)
        store_first(out + row * args.out_stride, load(sum + row * sums_stride), n);
    } else {
      const Vec16 bias = load_first(args.bias + column + from, n);
      for (int64_t row = 0; row < num_rows; ++row) {
        store_first(out + row * args.out_stride, add(load(sum + row * sums_stride), bias), n);
      }
    }
  }
}

template <class Weights>
void run_panel(const QuantizedLinearArgs& args, int64_t panel, int64_t first_row, int64_t num_rows) {
  alignas(64) float own_sums[kQuantizedRows * kPanelColumns];
  Tile tile;
  tile.layout = panel_layout(Weights::kFormat, args.group_len);
  tile.codes_stride = args.rows.padded_k;
  tile.row_stride = args.rows.row_stride;
  tile.codes = args.rows.codes + first_row * tile.codes_stride;
  tile.scales = args.rows.scales + first_row;
  tile.offsets = args.rows.offsets + first_row;
  tile.weight = args.weight + panel * panel_bytes(tile.layout, args.in_features);
  tile.sums = args.is_out_of_item ? args.out : own_sums;
  tile.sums_stride = args.is_out_of_item ? args.out_stride : kPanelColumns;
  tile.out_stride = args.out_stride;
  for (int64_t k = 0; k < args.in_features; k += kQuantizedChain) {
    const int64_t left = args.in_features - k;
    tile.num_k = least(left, kQuantizedChain);
    tile.is_first = k == 0;
    const bool leads_out = left <= kQuantizedChain && !args.is_out_of_item;
    tile.out = leads_out ? args.out + first_row * args.out_stride + panel * kPanelColumns : nullptr;
    run_tiles<Weights>(tile, num_rows);
    add_outliers<Weights>(args, tile, first_row, num_rows, k);
    tile.codes += kQuantizedChain;
    tile.scales += kQuantizedChain / kActivationGroup * tile.row_stride;
    tile.offsets += kQuantizedChain / args.group_len * tile.row_stride;
    tile.weight += panel_bytes(tile.layout, kQuantizedChain);
  }
  finish(args, first_row, num_rows, panel * kPanelColumns, tile.sums, tile.sums_stride);
}

template <template <int64_t> class Weights>
void run_groups(const QuantizedLinearArgs& args, int64_t panel, int64_t first_row, int64_t num_rows) {
  if (args.group_len == kActivationGroup) {
    run_panel<Weights<kActivationGroup>>(args, panel, first_row, num_rows);
  } else {
    run_panel<Weights<32>>(args, panel, first_row, num_rows);
  }
}

}  // namespace

void quantized_linear(const QuantizedLinearArgs& args, int64_t begin, int64_t end) {
  const int64_t num_panels = (args.out_features + kPanelColumns - 1) / kPanelColumns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_row = item / num_panels * args.rows_per_block;
    const int64_t left = args.num_rows - first_row;
    const int64_t num_rows = left < args.rows_per_block ? left : args.rows_per_block;
    const int64_t panel = item % num_panels;
    switch (args.format) {
      case WeightFormat::kInt8: run_groups<Int8Weights>(args, panel, first_row, num_rows); break;
      case WeightFormat::kInt4: run_groups<Int4Weights>(args, panel, first_row, num_rows); break;
      default: run_groups<Int4AffineWeights>(args, panel, first_row, num_rows);
    }
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
