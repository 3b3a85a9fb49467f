#include "ops/quantized_linear.h"

namespace engine::ops {
namespace {

// Rows that one thread quantises sooner than it would wake the others.
constexpr int64_t kSmallInput = 8192;

// The parts of the scratch memory, each at a cache line.
struct RowsMemory {
  QuantizedRows rows;
  float* ordered;  // [T, K], where the weights' columns have an order of their own
  int64_t num_bytes;
};

RowsMemory lay_out(char* data, int64_t num_rows, const cpu::PackedMatrix& weight) {
  const int64_t num_k = weight.in_features(), group_len = weight.layout().group_len;
  const int64_t padded_k = divide_up(num_k, kActivationGroup) * kActivationGroup;
  int64_t end = 0;
  const auto next = [&](int64_t num_bytes) {
    char* part = data + end;
    end += divide_up(num_bytes, 64) * 64;
    return part;
  };
  RowsMemory memory{};
  memory.rows.codes = reinterpret_cast<int8_t*>(next(num_rows * padded_k));
  memory.rows.scales = reinterpret_cast<float*>(next(num_rows * padded_k / kActivationGroup * 4));
  memory.rows.offsets = reinterpret_cast<int32_t*>(next(num_rows * padded_k / group_len * 4));
  memory.rows.padded_k = padded_k;
  memory.rows.row_stride = num_rows;
  const int64_t num_chains = divide_up(num_k, kQuantizedChain);
  memory.rows.outlier_words = num_chains * kQuantizedChain / 64;
  const int64_t num_groups = num_chains * kQuantizedChain / kActivationGroup;
  memory.rows.has_outliers = reinterpret_cast<uint8_t*>(next(num_rows * num_groups + 8));
  memory.rows.outliers = reinterpret_cast<uint64_t*>(next(num_rows * memory.rows.outlier_words * 8));
  memory.ordered = reinterpret_cast<float*>(next(weight.column_order() == nullptr ? 0 : num_rows * num_k * 4));
  memory.num_bytes = end;
  return memory;
}

// Rows [begin, end) of x with their columns as the weights have them.
void put_in_order(const TensorView& x, const int32_t* order, int64_t begin, int64_t end, float* ordered) {
  const int64_t num_k = x.shape[1];
  for (int64_t row = begin; row < end; ++row) {
    const float* from = x.as<const float>() + row * x.strides[0];
    float* to = ordered + row * num_k;
    for (int64_t k = 0; k < num_k; ++k) to[k] = from[order[k]];
  }
}

}  // namespace

void quantized_linear(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& weight,
                      const float* bias, GateKernel gate, const TensorView& out) {
  const int64_t num_rows = x.shape[0], num_k = weight.in_features();
  const int64_t group_len = weight.layout().group_len;
  const auto scratch = context.scratch().take(lay_out(nullptr, num_rows, weight).num_bytes);
  const RowsMemory memory = lay_out(scratch.data, num_rows, weight);
  const QuantizedRows& rows = memory.rows;
  const int32_t* order = weight.column_order();
  const int64_t x_stride = order == nullptr ? x.strides[0] : num_k;

  const QuantizeRowsArgs quantize{
      .x = order == nullptr ? x.as<const float>() : memory.ordered,
      .column_scales = weight.column_scales(),
      .rows = rows,
      .x_stride = x_stride,
      .in_features = num_k,
      .group_len = group_len,
      .weight_zero = zero_code(weight.format()),
  };
  const auto quantize_rows = context.kernels().quantize_rows;
  context.pool().parallel_for(num_rows, divide_up(kSmallInput, num_k), [&](int64_t begin, int64_t end) {
    if (order != nullptr) put_in_order(x, order, begin, end, memory.ordered);
    quantize_rows(quantize, begin, end);
  });

  const QuantizedLinearArgs args{
      .x = quantize.x,
      .column_scales = quantize.column_scales,
      .rows = rows,
      .weight = static_cast<const uint8_t*>(weight.data()),
      .bias = bias,
      .out = out.as<float>(),
      .x_stride = x_stride,
      .out_stride = out.strides[0],
      .num_rows = num_rows,
      .in_features = num_k,
      .out_features = weight.out_features(),
      .rows_per_block = 0,
      .group_len = group_len,
      .format = weight.format(),
      .is_out_of_item = false,
  };
  const auto kernel = context.kernels().quantized_linear;
  if (gate == nullptr) return run_product<kQuantizedRows>(context, args, kernel);
  run_gated_product<kQuantizedRows>(context, args, kernel, gate);
}

}  // namespace engine::ops
