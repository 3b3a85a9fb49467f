// How products are cut into work items and run. Results do not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/execution_context.h"
#include "engine/kernel_args.h"

namespace engine::ops {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items are (block of rows, panel). Few rows are one block, so that the weights are read once. More
// are split, but only as far as the panels alone do not keep all threads busy.
struct RowBlocks {
  RowBlocks(int64_t num_rows, int64_t out_features, int64_t most_rows, int64_t num_threads) {
    // Blocks smaller than this waste more in reading the weights again than an idle thread costs.
    constexpr int64_t kFewRows = 24;
    // Ranges per thread: a thread that loses its core delays the others by one range at most.
    constexpr int64_t kRangesPerThread = 8;
    constexpr int64_t kMaxGrain = 16;
    constexpr int64_t kTileRows = 6, kBlocksToFill = 3;
    num_panels = divide_up(out_features, kPanelColumns);
    const int64_t wanted = divide_up(kRangesPerThread * num_threads, num_panels);
    const int64_t num_blocks = std::max(divide_up(num_rows, most_rows), std::min(wanted, num_rows / kFewRows));
    rows_per_block = divide_up(num_rows, std::max<int64_t>(num_blocks, 1));
    // Whole register tiles of products of bytes, but for the last block's, which has fewer rows then.
    if (num_blocks >= kBlocksToFill) rows_per_block = divide_up(rows_per_block, kTileRows) * kTileRows;
    num_items = divide_up(num_rows, rows_per_block) * num_panels;
    grain = std::clamp<int64_t>(num_items / (kRangesPerThread * num_threads), 1, kMaxGrain);
  }

  int64_t num_panels;
  int64_t rows_per_block;
  int64_t num_items;
  int64_t grain;
};

template <class Args>
using ProductKernel = void (*)(const Args& args, int64_t begin, int64_t end);

// Makes activation(gate) * up of rows that hold gate and up side by side; null: a product is left as it is.
using GateKernel = decltype(cpu::KernelTable::silu_mul);

// Of LinearArgs or QuantizedLinearArgs, `kMostRows` rows a block at most.
template <int64_t kMostRows, class Args>
void run_product(cpu::ExecutionContext& context, Args args, ProductKernel<Args> multiply) {
  const RowBlocks blocks(args.num_rows, args.out_features, kMostRows, context.pool().num_threads());
  args.rows_per_block = blocks.rows_per_block;
  context.pool().parallel_for(blocks.num_items, blocks.grain,
                              [&](int64_t begin, int64_t end) { multiply(args, begin, end); });
}

// The same for out [T, N / 2]: an item computes a panel of the gate and that of up, each with the bits that it
// has in the whole product, and joins them while they are cached. Both halves consist of whole panels.
template <int64_t kMostRows, class Args>
void run_gated_product(cpu::ExecutionContext& context, Args args, ProductKernel<Args> multiply,
                       GateKernel gate) {
  constexpr int64_t kStride = 2 * kPanelColumns;
  const RowBlocks blocks(args.num_rows, args.out_features / 2, kMostRows, context.pool().num_threads());
  args.rows_per_block = blocks.rows_per_block;
  context.pool().parallel_for(blocks.num_items, blocks.grain, [&](int64_t begin, int64_t end) {
    alignas(64) float gate_up[kMostRows * kStride];
    Args half = args;
    half.out_stride = kStride;
    half.is_out_of_item = true;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / blocks.num_panels, panel = item % blocks.num_panels;
      for (int64_t part = 0; part < 2; ++part) {
        const int64_t product_item = (2 * block + part) * blocks.num_panels + panel;
        half.out = gate_up + part * kPanelColumns;
        multiply(half, product_item, product_item + 1);
      }
      const int64_t first_row = block * blocks.rows_per_block;
      float* out = args.out + first_row * args.out_stride + panel * kPanelColumns;
      gate({gate_up, out, kStride, args.out_stride, kPanelColumns}, 0,
           std::min(blocks.rows_per_block, args.num_rows - first_row));
    }
  });
}

}  // namespace engine::ops
