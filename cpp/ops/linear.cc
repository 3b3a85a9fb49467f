#include "ops/linear.h"

#include <optional>
#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"
#include "ops/products.h"
#include "ops/quantized_linear.h"

namespace engine::ops {
namespace {

// So many rows that reading a panel costs nothing beside the products, and so few that their next
// 256 inputs stay in the second-level cache from panel to panel.
constexpr int64_t kMaxRowsPerBlock = 192;

void expect_complete(const cpu::PackedMatrix& weight) {
  if (!weight.is_complete()) {
    throw Error(ErrorCode::kInvalidArgument, "weight: not all of its rows have been packed");
  }
}

GateKernel gate_kernel(const cpu::KernelTable& kernels, Activation activation) {
  switch (activation) {
    case Activation::kSilu: return kernels.silu_mul;
    case Activation::kTanhGelu: return kernels.gelu_mul;
    case Activation::kGelu: return kernels.erf_gelu_mul;
    default: throw Error(ErrorCode::kInvalidArgument, "activation: expected silu, gelu_tanh or gelu");
  }
}

// The rows of x in bfloat16, with a stride that `round_rows` fills.
void round_rows(cpu::ExecutionContext& context, const TensorView& x, uint16_t* out, int64_t out_stride) {
  constexpr int64_t kSmallInput = 8192;  // rows that one thread rounds sooner than it would wake the others
  const RoundRowsArgs args{
      .x = x.as<const float>(),
      .out = out,
      .x_stride = x.strides[0],
      .out_stride = out_stride,
      .in_features = x.shape[1],
  };
  const auto kernel = context.kernels().round_rows;
  context.pool().parallel_for(x.shape[0], divide_up(kSmallInput, x.shape[1]),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// out [T, N], or with a gate [T, N / 2].
void check(const TensorView& x, const cpu::PackedMatrix& weight, const TensorView* bias, GateKernel gate,
           const TensorView& out) {
  Dim T("T"), K("K", weight.in_features()), N("N", weight.out_features());
  if (gate != nullptr && N % (2 * kPanelColumns) != 0) {
    throw Error(ErrorCode::kInvalidArgument, "weight: expected a multiple of " +
                                                 std::to_string(2 * kPanelColumns) + " rows, got " +
                                                 std::to_string(N.value()));
  }
  Dim columns(gate == nullptr ? "N" : "N/2", gate == nullptr ? N : N / 2);
  expect(x, "x", {DType::kFloat32}, {T, K}, Layout::kRows);
  if (bias != nullptr) expect(*bias, "bias", {DType::kFloat32}, {N});
  expect(out, "out", {DType::kFloat32}, {T, columns}, Layout::kRows);
  expect_complete(weight);
}

const float* data_of(const TensorView* bias) { return bias != nullptr ? bias->as<const float>() : nullptr; }

void multiply(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& weight,
              const TensorView* bias, GateKernel gate, const TensorView& out) {
  check(x, weight, bias, gate, out);
  const int64_t T = x.shape[0], K = weight.in_features();
  if (T == 0) return;
  const float* bias_data = data_of(bias);
  if (is_quantized(weight.format())) return quantized_linear(context, x, weight, bias_data, gate, out);
  const bool is_rounded = weight.format() == WeightFormat::kBFloat16Dot;
  const int64_t rounded_stride = divide_up(K, 2) * 2;
  std::optional<cpu::Scratch::Hold> scratch;
  if (is_rounded) {
    scratch = context.scratch().take(T * rounded_stride * 2);
    round_rows(context, x, reinterpret_cast<uint16_t*>(scratch->data), rounded_stride);
  }
  const LinearArgs args{
      .x = is_rounded ? static_cast<const void*>(scratch->data) : x.as<const float>(),
      .weight = weight.data(),
      .bias = bias_data,
      .out = out.as<float>(),
      .x_stride = is_rounded ? rounded_stride : x.strides[0],
      .out_stride = out.strides[0],
      .num_rows = T,
      .in_features = K,
      .out_features = weight.out_features(),
      .rows_per_block = 0,
      .format = weight.format(),
      .has_bf16_dot = cpu::has_bf16_dot(context.isa()),
      .is_out_of_item = false,
  };
  const auto kernel = context.kernels().linear;
  if (gate == nullptr) return run_product<kMaxRowsPerBlock>(context, args, kernel);
  run_gated_product<kMaxRowsPerBlock>(context, args, kernel, gate);
}

}  // namespace

void linear(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& weight,
            const TensorView* bias, const TensorView& out) {
  multiply(context, x, weight, bias, nullptr, out);
}

void gated_linear(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& weight,
                  const TensorView* bias, Activation activation, const TensorView& out) {
  multiply(context, x, weight, bias, gate_kernel(context.kernels(), activation), out);
}

void gated_mlp(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& gate_up,
               const TensorView* gate_up_bias, Activation activation, const TensorView& product,
               const cpu::PackedMatrix& down, const TensorView* down_bias, const TensorView& out) {
  const GateKernel gate = gate_kernel(context.kernels(), activation);
  check(x, gate_up, gate_up_bias, gate, product);
  check(product, down, down_bias, nullptr, out);
  const bool is_ordered = down.column_order() == nullptr;
  if (x.shape[0] > 0 && is_ordered && is_quantized(gate_up.format()) && is_quantized(down.format())) {
    return quantized_gated_mlp(context, x, {gate_up, data_of(gate_up_bias)}, gate, product,
                               {down, data_of(down_bias)}, out);
  }
  multiply(context, x, gate_up, gate_up_bias, gate, product);
  multiply(context, product, down, down_bias, nullptr, out);
}

void embedding(cpu::ExecutionContext& context, const TensorView& token_ids, const cpu::PackedMatrix& weight,
               const TensorView& out) {
  Dim T("T"), K("K", weight.in_features());
  expect(token_ids, "token_ids", {DType::kInt32}, {T});
  expect(out, "out", {DType::kFloat32}, {T, K}, Layout::kRows);
  expect_complete(weight);
  EmbeddingArgs args{};
  args.token_ids = token_ids.as<const int32_t>();
  for (int64_t i = 0; i < T; ++i) {
    const int64_t id = args.token_ids[i];
    if (id < 0 || id >= weight.out_features()) {
      throw Error(ErrorCode::kInvalidArgument,
                  "token_ids: expected ids from 0 to V-1 with V=" + std::to_string(weight.out_features()) +
                      ", got " + std::to_string(id) + " at index " + std::to_string(i));
    }
  }
  args.weight = weight.data();
  args.column_scales = weight.column_scales();
  args.column_order = weight.column_order();
  args.format = weight.format();
  args.group_len = weight.layout().group_len;
  args.out = out.as<float>();
  args.out_stride = out.strides[0];
  args.in_features = K;
  const auto kernel = context.kernels().embedding;
  context.pool().parallel_for(T, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
