// How a product's panels and rows are split into work items. Results do not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>

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
    const int64_t num_panels = divide_up(out_features, kPanelColumns);
    const int64_t wanted = divide_up(kRangesPerThread * num_threads, num_panels);
    const int64_t num_blocks = std::max(divide_up(num_rows, most_rows), std::min(wanted, num_rows / kFewRows));
    rows_per_block = divide_up(num_rows, std::max<int64_t>(num_blocks, 1));
    num_items = divide_up(num_rows, rows_per_block) * num_panels;
    grain = std::clamp<int64_t>(num_items / (kRangesPerThread * num_threads), 1, kMaxGrain);
  }

  int64_t rows_per_block;
  int64_t num_items;
  int64_t grain;
};

}  // namespace engine::ops
