// Which tiles of queries walk which splits of keys in a step.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "engine/kernel_args.h"

namespace engine::cpu {

// Splits are computed apart and joined in order, so no bit of a result depends on what is decided here.
// Sequences with few rows, whose tiles would not be full, have common tiles for the leading splits whose
// blocks they share; and walks are cut where there are too few tiles for the threads.
//
// Grows to the largest demand and stays. One op at a time builds it, and holds lock() while it uses it.
class AttentionSchedule {
 public:
  std::unique_lock<std::mutex> lock() { return std::unique_lock<std::mutex>(mutex_); }

  // Reads the sequences of `args`, which are checked.
  void build(const PagedAttentionArgs& args, int num_threads);

  const std::vector<AttentionRow>& rows() const { return rows_; }
  // Those that leave partial results, and those that join them and may run when the first are done.
  const std::vector<AttentionUnit>& partial_units() const { return partial_units_; }
  const std::vector<AttentionUnit>& joining_units() const { return joining_units_; }
  int64_t num_partial_floats() const { return num_partial_floats_; }

 private:
  // Rows of one sequence; sequences that share blocks are neighbours.
  struct Sequence {
    int32_t index;  // in the step
    int32_t num_rows;
    int32_t first_row;      // in rows_
    int32_t num_shareable;  // leading splits whose tokens are all there
    int32_t num_shared;     // leading splits that have the blocks of the left neighbour
    int32_t num_done;       // leading splits of which partial units take care
  };

  const int32_t* block_table(const Sequence& sequence) const;
  int64_t num_shareable_blocks(const Sequence& sequence) const;
  int64_t count_equal_blocks(const Sequence& left, const Sequence& right) const;
  bool comes_before(const Sequence& left, const Sequence& right) const;
  void order_sequences();
  void add_rows(Sequence& sequence);
  void share(size_t first, size_t last, int32_t num_done);
  void finish(const Sequence& sequence);
  int64_t pieces_of(const std::vector<AttentionUnit>& units, int num_threads) const;
  void cut_joining_units(int64_t num_pieces);
  void place_partials();

  std::mutex mutex_;
  PagedAttentionArgs args_{};
  std::vector<Sequence> sequences_;
  size_t num_small_ = 0;  // the first sequences, with few rows
  std::vector<AttentionRow> rows_;
  std::vector<AttentionUnit> partial_units_, joining_units_, pieces_;
  int64_t num_partial_floats_ = 0;
};

}  // namespace engine::cpu
