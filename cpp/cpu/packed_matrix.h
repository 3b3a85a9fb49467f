// Owner of a linear layer's weights, in the one layout that all kernels read.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/large_buffer.h"
#include "cpu/thread_pool.h"
#include "engine/kernel_args.h"
#include "engine/tensor_view.h"

namespace engine::cpu {

// A matrix [N, K] (out_features, in_features) as panels of 32 output columns: [ceil(N / 32)][K][32],
// the missing columns of the last panel being zero. A step of k thus reads one cache line (bf16) or
// two (fp32), panels are read from front to back, and lanes run along the outputs, so that no
// sum depends on a vector width. In bf16 columns i and 16 + i of a panel are neighbours: one 512-bit
// load, a shift and a mask widen them to two vectors. Quantised formats have scales per group of k in
// their panels: see PanelLayout in engine/kernel_args.h.
class PackedMatrix {
 public:
  // All weights are zero at first. `group_len`, of quantised formats, is 32 or 128; 0 takes the
  // format's own. Throws kInvalidArgument for sizes that no memory holds.
  PackedMatrix(int64_t out_features, int64_t in_features, WeightFormat format, int64_t group_len = 0);

  int64_t out_features() const { return out_features_; }
  int64_t in_features() const { return in_features_; }
  WeightFormat format() const { return format_; }
  int64_t num_bytes() const { return buffer_->num_bytes(); }
  const void* data() const { return buffer_->data(); }
  const PanelLayout& layout() const { return layout_; }
  // [K], or null: the stored column k is that of the input column_order[k].
  const int32_t* column_order() const { return column_order_.empty() ? nullptr : column_order_.data(); }
  // [K], or null: the weights are those stored times these, and activations are multiplied with
  // them before they are quantised.
  const float* column_scales() const { return column_scales_.empty() ? nullptr : column_scales_.data(); }

  // Chooses the column scales from all rows that are going to be packed, in parts [n, K]. Optional, for
  // quantised formats, before any row is packed.
  void balance_columns(ThreadPool& pool, const std::vector<TensorView>& parts);

  // Stores `weight` [n, K] (fp32, bf16 or fp16; contiguous rows, any row stride) as the rows from
  // `row_start` on, rounded to nearest even. Fused layers pack their parts one by one; a row may be
  // packed again. Several threads may pack different rows.
  void pack_rows(ThreadPool& pool, int64_t row_start, const TensorView& weight);

  // Stores rows that are quantised already, exactly: `codes` uint8 [n, K], a weight's value being
  // scale * (code - zero_code(format)), for the affine format scale * code + offset. `scales` [n, groups
  // of k] are fp16 for int4, else fp32; `offsets`, as the scales, belong to the affine format alone.
  void pack_codes(ThreadPool& pool, int64_t row_start, const TensorView& codes, const TensorView& scales,
                  const TensorView* offsets);

  // The input column of each stored one, which groups of k that are no neighbours need: any
  // permutation, or nothing. Of quantised formats, without column scales.
  void set_column_order(std::vector<int32_t> order);
  const std::vector<int32_t>& stored_column_order() const { return column_order_; }

  bool is_complete() const;

  // The packed bytes as they are, to and from a file; the column scales travel beside them. The bytes
  // depend on nothing but the weights. What is returned is their sum, which differs where one word of them
  // does, and nearly always where more do. map_file reads nothing yet: pages come when they are touched.
  // Throws kUnsupported when the file cannot be written, or ends too early.
  uint64_t write_file(ThreadPool& pool, int fd, int64_t offset) const;
  uint64_t read_file(ThreadPool& pool, int fd, int64_t offset);
  void map_file(int fd, int64_t offset);
  // As it was made: no row is packed, and no column scaled or moved.
  void clear();
  const std::vector<float>& stored_column_scales() const { return column_scales_; }
  void set_column_scales(std::vector<float> scales);

 private:
  void complete();
  void check_rows(int64_t row_start, const TensorView& weight) const;
  void check_row_start(int64_t row_start, int64_t num_rows) const;
  void mark_packed(int64_t row_start, int64_t num_rows);
  void expect_writable() const;

  int64_t out_features_;
  int64_t in_features_;
  WeightFormat format_;
  PanelLayout layout_;
  std::unique_ptr<LargeBuffer> buffer_;
  std::vector<float> column_scales_;
  std::vector<int32_t> column_order_;

  mutable std::mutex mutex_;
  std::vector<bool> is_packed_;  // by row
  int64_t num_missing_;
};

}  // namespace engine::cpu
