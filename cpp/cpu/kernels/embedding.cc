#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {

// A token's weights are one column of its panel: one element of every k-row.
void embedding(const EmbeddingArgs& args, int64_t begin, int64_t end) {
  const int64_t num_k = args.in_features;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t id = args.token_ids[token];
    const int64_t panel = id / kPanelColumns * kPanelColumns * num_k;
    const int64_t column = id % kPanelColumns;
    float* out = args.out + token * args.out_stride;
    if (args.format == WeightFormat::kFloat32) {
      const float* weight = static_cast<const float*>(args.weight) + panel + column;
      for (int64_t k = 0; k < num_k; ++k) out[k] = weight[k * kPanelColumns];
    } else {
      const uint16_t* weight =
          static_cast<const uint16_t*>(args.weight) + panel + column % 16 * 2 + column / 16;
      for (int64_t k = 0; k < num_k; ++k) {
        const uint32_t bits = static_cast<uint32_t>(weight[k * kPanelColumns]) << 16;
        __builtin_memcpy(out + k, &bits, sizeof(bits));
      }
    }
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
