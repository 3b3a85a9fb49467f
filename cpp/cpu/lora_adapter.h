// Owner of one adapter's low-rank weights, in the layout and the order in which the kernels read them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/large_buffer.h"
#include "engine/kernel_args.h"
#include "engine/tensor_view.h"

namespace engine::cpu {

// What an adapter adds to one linear layer, or to one part of a fused layer: `rank` rows of A, and B
// for the output columns [first_column, first_column + num_columns).
struct LoraModule {
  int64_t first_column, num_columns, rank;
  float scale;
};

// A layer of the model, fused or not. Without modules the adapter leaves it alone. The rows of an
// embedding's A are looked up by token id, of which there are `in_features`.
struct LoraSite {
  int64_t in_features;
  bool is_embedding;
  std::vector<LoraModule> modules;
};

// All weights lie in one mapping, site after site, A before B, so that a step reads them from front
// to back, and through huge pages. A of a site is its modules' A one under the other, R rows in all, in
// panels of kLoraPanelRanks rows (fewer in the last): [panels][ceil(K / 32)][ranks of the panel][32],
// the last block of k filled up with zeros. A of an embedding is [V][R]. B of a module is
// [ceil(N / 32)][rank][32]. In bf16 elements i and 16 + i of 32 are neighbours, as in PackedMatrix.
class LoraAdapter {
 public:
  // Throws kInvalidArgument for sizes that no model has, and for modules of a site that do not come in
  // the order of their columns, or overlap.
  LoraAdapter(WeightFormat format, std::vector<LoraSite> sites);

  WeightFormat format() const { return format_; }
  int64_t num_sites() const { return static_cast<int64_t>(places_.size()); }
  int64_t num_bytes() const { return buffer_.num_bytes(); }
  bool is_complete() const { return num_missing_ == 0; }

  // Stores A [rank, K] and B [N, rank] (fp32, bf16 or fp16; contiguous rows) of a module, rounded to
  // nearest even. Each module once.
  void pack(int64_t site, int64_t module, const TensorView& a, const TensorView& b);

  const LoraSite& site(int64_t index) const { return places_[static_cast<size_t>(index)].site; }
  // The site as the kernels see it, without the rows of a call.
  LoraGroup group(int64_t index) const;

 private:
  struct Place {
    LoraSite site;
    int64_t rank;              // of all modules
    int64_t a_start, b_start;  // in elements
    std::vector<LoraPart> parts;
    std::vector<float> scales;  // [rank]
    std::vector<bool> is_packed;
  };

  static std::vector<Place> places(std::vector<LoraSite> sites);
  static int64_t num_elements(const std::vector<Place>& places);
  template <typename Stored>
  void pack_as(Place& place, const LoraPart& part, const TensorView& a, const TensorView& b);

  WeightFormat format_;
  std::vector<Place> places_;
  LargeBuffer buffer_;
  int64_t num_missing_ = 0;
};

}  // namespace engine::cpu
