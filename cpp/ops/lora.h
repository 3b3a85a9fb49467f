#pragma once

#include <memory>
#include <vector>

#include "cpu/execution_context.h"
#include "cpu/lora_adapter.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// Which rows of a step have which adapter; made once a step. Keeps the adapters alive.
class LoraPlan {
 public:
  // Rows row_ids[cu_rows[i] : cu_rows[i + 1]] belong to adapters[i]. Throws kInvalidArgument for what
  // does not fit together.
  LoraPlan(std::vector<std::shared_ptr<const cpu::LoraAdapter>> adapters, const TensorView& cu_rows,
           const TensorView& row_ids);

  int64_t num_groups() const { return static_cast<int64_t>(adapters_.size()); }
  const cpu::LoraAdapter& adapter(int64_t group) const { return *adapters_[static_cast<size_t>(group)]; }
  int64_t num_rows(int64_t group) const;
  const int32_t* row_ids(int64_t group) const;
  // One more than the largest row.
  int64_t row_end() const { return row_end_; }

 private:
  std::vector<std::shared_ptr<const cpu::LoraAdapter>> adapters_;
  std::vector<int32_t> cu_rows_, row_ids_;
  int64_t row_end_ = 0;
};

// Adapters that one plan may have.
inline constexpr int64_t kMaxLoraGroups = 256;

// out[row] += what the row's adapter adds at `site`, for the rows of the plan. See
// python/engine/ops/lora.py.
void lora(cpu::ExecutionContext& context, const TensorView& x, int64_t site, const LoraPlan& plan,
          const TensorView& workspace, const TensorView& out);

// The same for a site that is an embedding.
void lora_embedding(cpu::ExecutionContext& context, const TensorView& token_ids, int64_t site,
                    const LoraPlan& plan, const TensorView& workspace, const TensorView& out);

}  // namespace engine::ops
