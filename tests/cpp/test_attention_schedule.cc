// How often keys and values are walked: those of a prefix that sequences share once for all of them, whatever
// the order of the sequences, and those of one sequence once for all query heads of a group.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "cpu/attention_schedule.h"

namespace {

using engine::AttentionUnit;
using engine::PagedAttentionArgs;
using engine::cpu::AttentionSchedule;

constexpr int64_t kBlock = 16, kSplitBlocks = engine::kAttentionSplit / kBlock;

void require(int64_t found, int64_t expected, const char* what) {
  if (found == expected) return;
  std::fprintf(stderr, "failed: %s: %lld, expected %lld\n", what, static_cast<long long>(found),
               static_cast<long long>(expected));
  std::exit(1);
}

// Sequences that decode one token each, of `num_blocks` blocks, the first `num_shared` of which are the same.
struct Step {
  Step(int64_t batch, int64_t num_blocks, int64_t num_shared, int64_t heads_per_group) {
    for (int64_t b = 0; b < batch; ++b) {
      cu_seqlens.push_back(static_cast<int32_t>(b + 1));
      kv_lens.push_back(static_cast<int32_t>(num_blocks * kBlock));
      for (int64_t i = 0; i < num_blocks; ++i) {
        // Own blocks descend from sequence to sequence, so that sorting has something to do.
        const int64_t own = 1000 * (batch - b) + i;
        table.push_back(static_cast<int32_t>(i < num_shared ? i : own));
      }
    }
    args.cu_seqlens_q = cu_seqlens.data();
    args.kv_lens = kv_lens.data();
    args.block_tables = table.data();
    args.block_tables_stride = num_blocks;
    args.B = batch;
    args.G = 2;
    args.H = 2 * heads_per_group;
    args.D = 64;
    args.S = kBlock;
    args.is_causal = true;
  }

  // Splits that are walked, for each KV head, by one thread, by `num_pairs` pairs of row and head together.
  int64_t num_walks(int num_threads) {
    schedule.build(args, num_threads);
    int64_t count = 0, num_seen = 0;
    for (const auto* units : {&schedule.partial_units(), &schedule.joining_units()}) {
      for (const AttentionUnit& unit : *units) {
        count += unit.end_split - unit.first_split;
        num_seen += (unit.end_split - unit.first_split) * unit.num_pairs;
      }
    }
    const int64_t num_splits = (kv_lens[0] + engine::kAttentionSplit - 1) / engine::kAttentionSplit;
    require(num_seen, args.B * args.H / args.G * num_splits, "every pair sees every split once");
    return count;
  }

  std::vector<int32_t> cu_seqlens = {0}, kv_lens, table;
  PagedAttentionArgs args{};
  AttentionSchedule schedule;
};

void a_sequence_is_read_once_for_all_heads_of_a_group() {
  for (int64_t heads : {1, 7, 16}) {
    for (int threads : {1, 2, 3})
      require(Step(1, 4 * kSplitBlocks, 0, heads).num_walks(threads), 4, "walks of one");
  }
}

void a_shared_prefix_is_read_once_for_a_tile_of_rows() {
  // 4 rows of 7 heads are 28 of the 32 pairs of a tile: four splits once, and each row's own one.
  require(Step(4, 4 * kSplitBlocks + 3, 4 * kSplitBlocks, 7).num_walks(2), 4 + 4, "walks of four rows");
  require(Step(4, 4 * kSplitBlocks + 3, 0, 7).num_walks(2), 4 * 5, "walks of four rows that share nothing");
  // 8 rows are two tiles.
  require(Step(8, 4 * kSplitBlocks + 3, 4 * kSplitBlocks, 7).num_walks(2), 2 * 4 + 8, "walks of eight rows");
  // A split that is shared in part is each row's own.
  require(Step(4, 4 * kSplitBlocks + 3, 4 * kSplitBlocks - 1, 7).num_walks(2), 3 + 4 * 2, "a part of a split");
}

}  // namespace

int main() {
  a_sequence_is_read_once_for_all_heads_of_a_group();
  a_shared_prefix_is_read_once_for_a_tile_of_rows();
  return 0;
}
