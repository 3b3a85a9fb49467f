#include "ops/lora.h"

#include <algorithm>
#include <string>
#include <utility>

#include "engine/error.h"
#include "engine/tensor_spec.h"

namespace engine::ops {
namespace {

constexpr int64_t kLanes = 32;
// Ranges per thread, as in linear.cc.
constexpr int64_t kRangesPerThread = 4;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[noreturn]] void refuse(const std::string& what) { throw Error(ErrorCode::kInvalidArgument, what); }

// The groups of one call that have something to add, and how many items each kernel gets.
struct Call {
  LoraGroup groups[kMaxLoraGroups];
  int64_t num_groups = 0;
  int64_t num_shrink_items = 0, num_expand_items = 0;
};

void check_group(const cpu::LoraAdapter& adapter, int64_t site, bool is_embedding, int64_t in_features,
                 int64_t num_columns) {
  if (site < 0 || site >= adapter.num_sites()) {
    refuse("site: expected 0 to " + std::to_string(adapter.num_sites() - 1) + ", got " + std::to_string(site));
  }
  const cpu::LoraSite& shape = adapter.site(site);
  if (shape.modules.empty()) return;
  if (shape.is_embedding != is_embedding)
    refuse("site: an embedding is looked up, other layers are multiplied");
  if (!is_embedding && shape.in_features != in_features) {
    refuse("x: expected [T, K=" + std::to_string(shape.in_features) +
           "], got K=" + std::to_string(in_features));
  }
  const int64_t end = shape.modules.back().first_column + shape.modules.back().num_columns;
  if (end > num_columns) {
    refuse("out: expected at least " + std::to_string(end) + " columns, got " + std::to_string(num_columns));
  }
}

void collect(Call& call, int64_t site, const LoraPlan& plan, bool is_embedding, int64_t in_features,
             const TensorView& workspace, const TensorView& out) {
  if (plan.row_end() > out.shape[0]) {
    refuse("plan: has row " + std::to_string(plan.row_end() - 1) + ", but out has " +
           std::to_string(out.shape[0]) + " rows");
  }
  int64_t used = 0;
  for (int64_t i = 0; i < plan.num_groups(); ++i) {
    const cpu::LoraAdapter& adapter = plan.adapter(i);
    check_group(adapter, site, is_embedding, in_features, out.shape[1]);
    LoraGroup group = adapter.group(site);
    group.num_rows = plan.num_rows(i);
    if (group.rank == 0 || group.num_rows == 0) continue;
    group.row_ids = plan.row_ids(i);
    group.shrunk = workspace.as<float>() + used;
    used += group.num_rows * group.rank;
    if (used > workspace.shape[0]) {
      refuse("workspace: expected at least " + std::to_string(used) + " elements, got " +
             std::to_string(workspace.shape[0]));
    }
    const int64_t num_blocks = divide_up(group.num_rows, kLoraBlockRows);
    int64_t num_panels = 0;
    for (int64_t p = 0; p < group.num_parts; ++p) num_panels += divide_up(group.parts[p].num_columns, kLanes);
    group.first_shrink_item = call.num_shrink_items;
    group.first_expand_item = call.num_expand_items;
    call.num_shrink_items +=
        is_embedding ? group.num_rows : num_blocks * divide_up(group.rank, kLoraPanelRanks);
    call.num_expand_items += num_blocks * num_panels;
    call.groups[call.num_groups++] = group;
  }
}

template <typename Kernel>
void run(cpu::ExecutionContext& context, Kernel kernel, const LoraArgs& args, int64_t num_items) {
  cpu::ThreadPool& pool = context.pool();
  const int64_t grain = std::max<int64_t>(num_items / (kRangesPerThread * pool.num_threads()), 1);
  pool.parallel_for(num_items, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

LoraPlan::LoraPlan(std::vector<std::shared_ptr<const cpu::LoraAdapter>> adapters, const TensorView& cu_rows,
                   const TensorView& row_ids)
    : adapters_(std::move(adapters)) {
  Dim n("G+1", num_groups() + 1), R("R");
  expect(cu_rows, "cu_rows", {DType::kInt32}, {n});
  expect(row_ids, "row_ids", {DType::kInt32}, {R});
  if (num_groups() > kMaxLoraGroups) refuse("adapters: expected at most " + std::to_string(kMaxLoraGroups));
  cu_rows_.assign(cu_rows.as<const int32_t>(), cu_rows.as<const int32_t>() + n);
  row_ids_.assign(row_ids.as<const int32_t>(), row_ids.as<const int32_t>() + R);
  if (cu_rows_.front() != 0 || cu_rows_.back() != R || !std::is_sorted(cu_rows_.begin(), cu_rows_.end())) {
    refuse("cu_rows: expected ascending numbers from 0 to " + std::to_string(R.value()));
  }
  for (const auto& adapter : adapters_) {
    if (!adapter || !adapter->is_complete()) refuse("adapters: not all modules have been packed");
  }
  std::vector<int32_t> sorted = row_ids_;
  std::sort(sorted.begin(), sorted.end());
  if (!sorted.empty() && sorted.front() < 0) refuse("row_ids: expected no negative row");
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    refuse("row_ids: expected each row once");  // two adapters would write one row at the same time
  }
  row_end_ = sorted.empty() ? 0 : int64_t{sorted.back()} + 1;
}

int64_t LoraPlan::num_rows(int64_t group) const {
  return cu_rows_[static_cast<size_t>(group) + 1] - cu_rows_[static_cast<size_t>(group)];
}

const int32_t* LoraPlan::row_ids(int64_t group) const {
  return row_ids_.data() + cu_rows_[static_cast<size_t>(group)];
}

void lora(cpu::ExecutionContext& context, const TensorView& x, int64_t site, const LoraPlan& plan,
          const TensorView& workspace, const TensorView& out) {
  Dim T("T"), K("K"), N("N"), W("W");
  expect(x, "x", {DType::kFloat32}, {T, K}, Layout::kRows);
  expect(workspace, "workspace", {DType::kFloat32}, {W});
  expect(out, "out", {DType::kFloat32}, {T, N}, Layout::kRows);
  Call call;
  collect(call, site, plan, false, K, workspace, out);
  if (call.num_groups == 0) return;
  LoraArgs args{};
  args.groups = call.groups;
  args.num_groups = call.num_groups;
  args.x = x.as<const float>();
  args.x_stride = x.strides[0];
  args.in_features = K;
  args.out = out.as<float>();
  args.out_stride = out.strides[0];
  run(context, context.kernels().lora_shrink, args, call.num_shrink_items);
  run(context, context.kernels().lora_expand, args, call.num_expand_items);
}

void lora_embedding(cpu::ExecutionContext& context, const TensorView& token_ids, int64_t site,
                    const LoraPlan& plan, const TensorView& workspace, const TensorView& out) {
  Dim T("T"), N("N"), W("W");
  expect(token_ids, "token_ids", {DType::kInt32}, {T});
  expect(workspace, "workspace", {DType::kFloat32}, {W});
  expect(out, "out", {DType::kFloat32}, {T, N}, Layout::kRows);
  Call call;
  collect(call, site, plan, true, 0, workspace, out);
  if (call.num_groups == 0) return;
  LoraArgs args{};
  args.groups = call.groups;
  args.num_groups = call.num_groups;
  args.token_ids = token_ids.as<const int32_t>();
  args.out = out.as<float>();
  args.out_stride = out.strides[0];
  for (int64_t i = 0; i < plan.num_groups(); ++i) {
    const cpu::LoraSite& shape = plan.adapter(i).site(site);
    for (int64_t row = 0; row < plan.num_rows(i) && !shape.modules.empty(); ++row) {
      const int64_t id = args.token_ids[plan.row_ids(i)[row]];
      if (id < 0 || id >= shape.in_features) {
        refuse("token_ids: expected ids from 0 to " + std::to_string(shape.in_features - 1) + ", got " +
               std::to_string(id));
      }
    }
  }
  run(context, context.kernels().lora_lookup, args, call.num_shrink_items);
  run(context, context.kernels().lora_expand, args, call.num_expand_items);
}

}  // namespace engine::ops
