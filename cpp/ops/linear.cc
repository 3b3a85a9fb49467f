#include "ops/linear.h"

#include <algorithm>
#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"

namespace engine::ops {
namespace {

// So many rows that reading a panel costs nothing beside the products, and so few that their next
// 256 inputs stay in the second-level cache from panel to panel.
constexpr int64_t kMaxRowsPerBlock = 192;
// Blocks smaller than this waste more in reading the weights again than an idle thread costs.
constexpr int64_t kMinRowsPerBlock = 24;
// Ranges per thread: a thread that loses its core delays the others by one range at most.
constexpr int64_t kRangesPerThread = 8;
constexpr int64_t kMaxGrain = 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void expect_complete(const cpu::PackedMatrix& weight) {
  if (!weight.is_complete()) {
    throw Error(ErrorCode::kInvalidArgument, "weight: not all of its rows have been packed");
  }
}

// Few rows are one block, so that the weights are read once. More are split, but only as far as
// the panels alone do not keep all threads busy.
int64_t rows_per_block(int64_t num_rows, int64_t num_panels, int64_t num_threads) {
  const int64_t wanted = divide_up(kRangesPerThread * num_threads, num_panels);
  const int64_t num_blocks =
      std::max(divide_up(num_rows, kMaxRowsPerBlock), std::min(wanted, num_rows / kMinRowsPerBlock));
  return divide_up(num_rows, std::max<int64_t>(num_blocks, 1));
}

}  // namespace

void linear(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& weight,
            const TensorView* bias, const TensorView& out) {
  Dim T("T"), K("K", weight.in_features()), N("N", weight.out_features());
  expect(x, "x", {DType::kFloat32}, {T, K}, Layout::kRows);
  if (bias != nullptr) expect(*bias, "bias", {DType::kFloat32}, {N});
  expect(out, "out", {DType::kFloat32}, {T, N}, Layout::kRows);
  expect_complete(weight);
  if (T == 0) return;
  const int64_t num_panels = divide_up(N, kPanelColumns);
  const int64_t num_threads = context.pool().num_threads();
  LinearArgs args{};
  args.x = x.as<const float>();
  args.x_stride = x.strides[0];
  args.weight = weight.data();
  args.format = weight.format();
  args.bias = bias != nullptr ? bias->as<const float>() : nullptr;
  args.out = out.as<float>();
  args.out_stride = out.strides[0];
  args.num_rows = T;
  args.in_features = K;
  args.out_features = N;
  args.rows_per_block = rows_per_block(T, num_panels, num_threads);
  const int64_t num_items = divide_up(T, args.rows_per_block) * num_panels;
  const int64_t grain = std::clamp<int64_t>(num_items / (kRangesPerThread * num_threads), 1, kMaxGrain);
  const auto kernel = context.kernels().linear;
  context.pool().parallel_for(num_items, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
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
  args.format = weight.format();
  args.out = out.as<float>();
  args.out_stride = out.strides[0];
  args.in_features = K;
  const auto kernel = context.kernels().embedding;
  context.pool().parallel_for(T, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
