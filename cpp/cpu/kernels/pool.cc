// One row out of the rows of each text. Rows are taken up one by one, in order, on top of what `out`
// holds, so that a text may come in any number of pieces.
#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

struct Sum {
  ENGINE_INLINE Vec16 take(Vec16 pooled, Vec16 row, Vec16) { return add(pooled, row); }
};
struct WeightedSum {
  ENGINE_INLINE Vec16 take(Vec16 pooled, Vec16 row, Vec16 weight) { return fma(row, weight, pooled); }
};
struct Max {
  ENGINE_INLINE Vec16 take(Vec16 pooled, Vec16 row, Vec16) { return max(pooled, row); }
};

template <typename Mode>
ENGINE_INLINE void run(const PoolArgs& args, int64_t begin, int64_t end) {
  for (int64_t text = begin; text < end; ++text) {
    const int64_t first = args.cu_rows[text];
    const int64_t num_rows = args.cu_rows[text + 1] - first;
    const float* x = args.x + first * args.x_stride;
    float* out = args.out + text * args.out_stride;
    for (int64_t i = 0; i < args.n; i += 16) {
      const int64_t lanes = args.n - i < 16 ? args.n - i : 16;
      Vec16 pooled = load_first(out + i, lanes);
      for (int64_t row = 0; row < num_rows; ++row) {
        const Vec16 weight = set1(static_cast<float>(args.first_positions[text] + row + 1));
        pooled = Mode::take(pooled, load_first(x + row * args.x_stride + i, lanes), weight);
      }
      store_first(out + i, pooled, lanes);
    }
  }
}

}  // namespace

void pool(const PoolArgs& args, int64_t begin, int64_t end) {
  switch (args.mode) {
    case PoolMode::kSum: return run<Sum>(args, begin, end);
    case PoolMode::kWeightedSum: return run<WeightedSum>(args, begin, end);
    case PoolMode::kMax: return run<Max>(args, begin, end);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
