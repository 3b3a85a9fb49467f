// Weights to 8-bit and 4-bit numbers with a scale per group of k, in the layout of the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/thread_pool.h"
#include "engine/kernel_args.h"
#include "engine/tensor_view.h"

namespace engine::cpu {

// Stores rows [n, K] as the matrix' rows from `row_start` on. int8: the largest of a group becomes +-127.
// int4: the one with the largest magnitude becomes code 0, as q4_0 of llama.cpp has it, so that
// all 16 codes are of use. A group that holds a NaN or an infinity gets a scale that is not a number.
// `column_scales` [K], or null, is what the weights are divided by first.
void quantize_rows(ThreadPool& pool, const TensorView& rows, int64_t row_start, WeightFormat format,
                   const PanelLayout& layout, const float* column_scales, uint8_t* panels);

// Rows that are quantised already: codes uint8 [n, K], scales [n, groups] fp16 for int4, else fp32,
// offsets fp32 [n, groups] of affine weights, else null.
struct CodedRows {
  const TensorView& codes;
  const TensorView& scales;
  const TensorView* offsets;
};

// Stores them as the matrix' rows from `row_start` on.
void store_codes(ThreadPool& pool, const CodedRows& rows, int64_t row_start, WeightFormat format,
                 const PanelLayout& layout, uint8_t* panels);

// Adds the magnitudes of the rows [n, K] to the sums of their columns, each in the order of the rows.
void add_column_magnitudes(ThreadPool& pool, const TensorView& rows, std::vector<double>& sums);

// Powers of two for the columns that are several times larger than the median one, 1 for the others;
// empty when no column is. Dividing the weights by them, and multiplying the activations,
// keeps such columns from taking the precision of their groups.
std::vector<float> column_scales(const std::vector<double>& magnitudes);

}  // namespace engine::cpu
