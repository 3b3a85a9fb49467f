#include "kernels/append_kv.cuh"

#include <cstdint>

#include "launch.h"
#include "launchers.h"

namespace engine::cuda {
namespace {

// Elements that are read at a time: eight, where all that lies together comes in eights, and begins where 16
// bytes can be read.
bool has_whole_vectors(const AppendKvArgs& args, const RotationArgs* rotation) {
  if (rotation == nullptr) return true;
  const bool in_eights = rotation->half % 8 == 0 && (args.cache.D / 2 - rotation->half) % 8 == 0;
  const auto tables = reinterpret_cast<uintptr_t>(rotation->cos) | reinterpret_cast<uintptr_t>(rotation->sin);
  return in_eights && tables % 16 == 0;
}

template <typename T, int kVector, bool kIsTurned>
void launch_vectors(const AppendKvArgs& args, const RotationArgs& rotation, void* stream) {
  int lanes = 1;
  while (lanes < kWarpLanes && lanes * kVector < args.cache.D / 2) lanes *= 2;
  const int64_t heads = (kIsTurned ? rotation.H : 0) + 2 * args.cache.G;
  const int64_t num_blocks = (args.T * heads * lanes + kAppendThreads - 1) / kAppendThreads;
  const auto kernel = args.cache.scales != nullptr ? append_kv_kernel<T, kVector, kIsTurned, true>
                                                   : append_kv_kernel<T, kVector, kIsTurned, false>;
  launch(kernel, dim3(static_cast<unsigned>(num_blocks)), dim3(kAppendThreads), 0, stream, args, rotation,
         lanes);
}

template <typename T>
void launch_format(const AppendKvArgs& args, const RotationArgs* rotation, void* stream) {
  const bool is_vector = has_whole_vectors(args, rotation);
  if (rotation == nullptr) {
    launch_vectors<T, 8, false>(args, {}, stream);
  } else if (is_vector) {
    launch_vectors<T, 8, true>(args, *rotation, stream);
  } else {
    launch_vectors<T, 1, true>(args, *rotation, stream);
  }
}

}  // namespace

void append_kv(const AppendKvArgs& args, const RotationArgs* rotation, void* stream) {
  if (args.T == 0 || args.cache.G == 0) return;
  switch (args.format) {
    case Format::kFloat32: return launch_format<float>(args, rotation, stream);
    case Format::kBFloat16: return launch_format<BFloat16>(args, rotation, stream);
    case Format::kFloat16: return launch_format<Float16>(args, rotation, stream);
  }
}

}  // namespace engine::cuda
