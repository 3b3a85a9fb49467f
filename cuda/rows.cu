#include "row_launchers.h"

#include <algorithm>
#include <cstdint>

#include "kernels/gated.cuh"
#include "kernels/rms_norm.cuh"
#include "launch.h"

namespace engine::cuda {
namespace {

// Whether an element's row can be moved 16 bytes at a time.
template <typename T>
bool is_vector(const void* data, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % kVectorOf<T> == 0;
}

unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

template <typename T, int kVector>
void launch_rms_norm(const RmsNormArgs& args, void* stream) {
  constexpr int64_t kMaxThreads = 1024;
  const int64_t warps = ceil_div(args.n, kVector * kWarpLanes);
  const unsigned threads = static_cast<unsigned>(std::min(kMaxThreads, warps * kWarpLanes));
  const unsigned rows = threads == kWarpLanes ? kNormRowsPerBlock : 1;
  launch(rms_norm_kernel<T, kVector>, dim3(ceil_div(args.num_rows, rows)), dim3(threads, rows),
         sizeof(RmsNormShared), stream, args);
}

template <typename T>
void rms_norm_of(const RmsNormArgs& args, void* stream) {
  const bool has_vectors = args.n % kVectorOf<T> == 0 && is_vector<T>(args.x, args.x_stride) &&
                           is_vector<T>(args.residual, args.residual_stride) &&
                           is_vector<T>(args.out, args.out_stride);
  has_vectors ? launch_rms_norm<T, kVectorOf<T>>(args, stream) : launch_rms_norm<T, 1>(args, stream);
}

template <typename T, typename Activation>
void gated_by(const GatedArgs& args, void* stream) {
  const bool has_vectors = args.n % kVectorOf<T> == 0 && is_vector<T>(args.gate_up, args.gate_up_stride) &&
                           is_vector<T>(args.out, args.out_stride);
  const int blocks = static_cast<int>(ceil_div(args.n, kElementThreads * (has_vectors ? kVectorOf<T> : 1)));
  const auto kernel = has_vectors ? gated_kernel<T, kVectorOf<T>, Activation> : gated_kernel<T, 1, Activation>;
  launch(kernel, dim3(static_cast<unsigned>(args.T * blocks)), dim3(kElementThreads), 0, stream, args, blocks);
}

template <typename T>
void gated_of(const GatedArgs& args, void* stream) {
  switch (args.gate) {
    case Gate::kSilu: return gated_by<T, Silu>(args, stream);
    case Gate::kTanhGelu: return gated_by<T, TanhGelu>(args, stream);
    case Gate::kErfGelu: return gated_by<T, ErfGelu>(args, stream);
    case Gate::kClampedSwiglu: return gated_by<T, ClampedSwiglu>(args, stream);
  }
}

template <typename Unit>
void look_up(const EmbeddingArgs& args, int64_t per_unit, void* stream) {
  const int64_t units = args.K / per_unit;
  const int blocks = static_cast<int>(ceil_div(units, kElementThreads));
  launch(embedding_kernel<Unit>, dim3(static_cast<unsigned>(args.T * blocks)), dim3(kElementThreads), 0, stream,
         args, units, args.weight_stride / per_unit, args.out_stride / per_unit, blocks);
}

template <typename T>
void embedding_of(const EmbeddingArgs& args, void* stream) {
  if (args.K % kVectorOf<T> == 0 && is_vector<T>(args.weight, args.weight_stride) &&
      is_vector<T>(args.out, args.out_stride)) {
    look_up<Pack<T, kVectorOf<T>>>(args, kVectorOf<T>, stream);
  } else {
    look_up<T>(args, 1, stream);
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args, void* stream) {
  if (args.num_rows == 0 || args.n == 0) return;
  switch (args.format) {
    case Format::kFloat32: return rms_norm_of<float>(args, stream);
    case Format::kBFloat16: return rms_norm_of<BFloat16>(args, stream);
    case Format::kFloat16: return rms_norm_of<Float16>(args, stream);
  }
}

void gated(const GatedArgs& args, void* stream) {
  if (args.T == 0 || args.n == 0) return;
  switch (args.format) {
    case Format::kFloat32: return gated_of<float>(args, stream);
    case Format::kBFloat16: return gated_of<BFloat16>(args, stream);
    case Format::kFloat16: return gated_of<Float16>(args, stream);
  }
}

void softcap(const SoftcapArgs& args, void* stream) {
  if (args.T == 0 || args.n == 0) return;
  const bool has_vectors = args.n % 4 == 0 && is_vector<float>(args.x, args.x_stride);
  const int blocks = static_cast<int>(ceil_div(args.n, kElementThreads * (has_vectors ? 4 : 1)));
  launch(has_vectors ? softcap_kernel<4> : softcap_kernel<1>, dim3(static_cast<unsigned>(args.T * blocks)),
         dim3(kElementThreads), 0, stream, args, blocks);
}

void embedding(const EmbeddingArgs& args, void* stream) {
  if (args.T == 0 || args.K == 0) return;
  switch (args.format) {
    case Format::kFloat32: return embedding_of<float>(args, stream);
    case Format::kBFloat16: return embedding_of<BFloat16>(args, stream);
    case Format::kFloat16: return embedding_of<Float16>(args, stream);
  }
}

}  // namespace engine::cuda
