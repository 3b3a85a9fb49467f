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
  memory.rows.has_outliers = reinterpret_cast<uint8_t*>(next(num_rows * padded_k / kActivationGroup + 8));
  memory.rows.outliers = reinterpret_cast<uint64_t*>(next(num_rows * padded_k / 8));
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

// The product of quantised rows, but for where it goes. Outliers are in x.
QuantizedLinearArgs product_args(const float* x, int64_t x_stride, const cpu::PackedMatrix& weight,
                                 const QuantizedRows& rows, int64_t num_rows) {
  QuantizedLinearArgs args{};
  args.x = x;
  args.x_stride = x_stride;
  args.column_scales = weight.column_scales();
  args.rows = rows;
  args.weight = static_cast<const uint8_t*>(weight.data());
  args.num_rows = num_rows;
  args.in_features = weight.in_features();
  args.out_features = weight.out_features();
  args.group_len = weight.layout().group_len;
  args.format = weight.format();
  return args;
}

// What of `rows` belongs to the k from a group of kActivationGroup on, of the rows from `row` on.
QuantizedRows part_of(QuantizedRows rows, int64_t row, int64_t group, int64_t group_len) {
  const int64_t k = group * kActivationGroup;
  rows.codes += row * rows.padded_k + k;
  rows.scales += group * rows.row_stride + row;
  rows.offsets += k / group_len * rows.row_stride + row;
  rows.has_outliers += group * rows.row_stride + row;
  rows.outliers += (row * rows.padded_k + k) / 64;
  return rows;
}

QuantizeRowsArgs quantize_args(const cpu::PackedMatrix& weight) {
  QuantizeRowsArgs args{};
  args.column_scales = weight.column_scales();
  args.in_features = weight.in_features();
  args.group_len = weight.layout().group_len;
  args.weight_zero = zero_code(weight.format());
  return args;
}

// Quantises x; returns what the product of that needs.
QuantizedLinearArgs quantize(cpu::ExecutionContext& context, const TensorView& x,
                             const cpu::PackedMatrix& weight, const RowsMemory& memory) {
  const int64_t num_k = weight.in_features();
  const int32_t* order = weight.column_order();
  QuantizeRowsArgs args = quantize_args(weight);
  args.x = order == nullptr ? x.as<const float>() : memory.ordered;
  args.x_stride = order == nullptr ? x.strides[0] : num_k;
  args.rows = memory.rows;
  const auto kernel = context.kernels().quantize_rows;
  context.pool().parallel_for(x.shape[0], divide_up(kSmallInput, num_k), [&](int64_t begin, int64_t end) {
    if (order != nullptr) put_in_order(x, order, begin, end, memory.ordered);
    kernel(args, begin, end);
  });
  return product_args(args.x, args.x_stride, weight, memory.rows, x.shape[0]);
}

// Columns of gate and up whose product is a group of activations, item by item: gate and up of some rows,
// joined and quantised while they are cached. `product` gets only outliers.
void quantize_gated(cpu::ExecutionContext& context, QuantizedLinearArgs args, GateKernel gate,
                    const TensorView& product, const cpu::PackedMatrix& down, const QuantizedRows& rows) {
  constexpr int64_t kStride = 2 * kPanelColumns, kPanels = kActivationGroup / kPanelColumns;
  const int64_t num_panels = product.shape[1] / kPanelColumns, num_groups = divide_up(num_panels, kPanels);
  // As if a group were a panel.
  const RowBlocks blocks(args.num_rows, num_groups * kPanelColumns, kQuantizedRows,
                         context.pool().num_threads());
  args.rows_per_block = blocks.rows_per_block;
  args.out_stride = kStride;
  args.is_out_of_item = true;
  const auto multiply = context.kernels().quantized_linear;
  const auto quantize_rows = context.kernels().quantize_rows;
  context.pool().parallel_for(blocks.num_items, blocks.grain, [&](int64_t begin, int64_t end) {
    alignas(64) float gate_up[kQuantizedRows * kStride], joined[kQuantizedRows * kActivationGroup];
    QuantizedLinearArgs half = args;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / num_groups, group = item % num_groups;
      const int64_t first_row = block * blocks.rows_per_block;
      const int64_t num_rows = std::min(blocks.rows_per_block, args.num_rows - first_row);
      const int64_t end_panel = std::min((group + 1) * kPanels, num_panels);
      for (int64_t panel = group * kPanels; panel < end_panel; ++panel) {
        for (int64_t part = 0; part < 2; ++part) {
          half.out = gate_up + part * kPanelColumns;
          const int64_t product_item = (2 * block + part) * num_panels + panel;
          multiply(half, product_item, product_item + 1);
        }
        float* out = joined + panel % kPanels * kPanelColumns;
        gate({gate_up, out, kStride, kActivationGroup, kPanelColumns}, 0, num_rows);
      }
      QuantizeRowsArgs quantize = quantize_args(down);
      const int64_t k = group * kActivationGroup;
      quantize.x = joined;
      quantize.x_stride = kActivationGroup;
      if (quantize.column_scales != nullptr) quantize.column_scales += k;
      quantize.outliers = product.as<float>() + first_row * product.strides[0] + k;
      quantize.outliers_stride = product.strides[0];
      quantize.rows = part_of(rows, first_row, group, quantize.group_len);
      quantize.in_features = std::min(product.shape[1] - k, kActivationGroup);
      quantize_rows(quantize, 0, num_rows);
    }
  });
}

void multiply(cpu::ExecutionContext& context, QuantizedLinearArgs args, const float* bias, GateKernel gate,
              const TensorView& out) {
  args.bias = bias;
  args.out = out.as<float>();
  args.out_stride = out.strides[0];
  const auto kernel = context.kernels().quantized_linear;
  if (gate == nullptr) return run_product<kQuantizedRows>(context, args, kernel);
  run_gated_product<kQuantizedRows>(context, args, kernel, gate);
}

}  // namespace

void quantized_linear(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& weight,
                      const float* bias, GateKernel gate, const TensorView& out) {
  const auto scratch = context.scratch().take(lay_out(nullptr, x.shape[0], weight).num_bytes);
  const RowsMemory memory = lay_out(scratch.data, x.shape[0], weight);
  multiply(context, quantize(context, x, weight, memory), bias, gate, out);
}

void quantized_gated_mlp(cpu::ExecutionContext& context, const TensorView& x, const QuantizedLayer& gate_up,
                         GateKernel gate, const TensorView& product, const QuantizedLayer& down,
                         const TensorView& out) {
  const int64_t num_rows = x.shape[0];
  const int64_t num_bytes = lay_out(nullptr, num_rows, gate_up.weight).num_bytes;
  const auto scratch = context.scratch().take(num_bytes + lay_out(nullptr, num_rows, down.weight).num_bytes);
  const RowsMemory from = lay_out(scratch.data, num_rows, gate_up.weight);
  const RowsMemory to = lay_out(scratch.data + num_bytes, num_rows, down.weight);
  QuantizedLinearArgs args = quantize(context, x, gate_up.weight, from);
  args.bias = gate_up.bias;
  quantize_gated(context, args, gate, product, down.weight, to.rows);
  const QuantizedLinearArgs last =
      product_args(product.as<const float>(), product.strides[0], down.weight, to.rows, num_rows);
  multiply(context, last, down.bias, nullptr, out);
}

}  // namespace engine::ops
