// Launching a kernel from C++, and noticing that it failed to start.
#pragma once

#include <string>
#include <utility>

#include "engine/error.h"
#include "simt.h"

namespace engine::cuda {

#ifdef ENGINE_SIMT_HOST

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/,
            std::type_identity_t<Parameters>... arguments) {
  simt::run_grid(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

// How many blocks run at a time on the whole device: few, so that each takes several items in its turn.
template <typename Kernel>
int resident_blocks(Kernel /*kernel*/, int /*num_threads*/, size_t /*shared_bytes*/) {
  return 3;
}

#else

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorCode::kInternal, std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Blocks may have this much shared memory without being asked.
inline constexpr size_t kPlainSharedBytes = 48 * 1024;

template <typename Kernel>
void allow_shared_memory(Kernel kernel, size_t shared_bytes) {
  if (shared_bytes <= kPlainSharedBytes) return;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
      "more shared memory");
}

// Faults inside the kernel show later, at the next call that waits for the device.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  allow_shared_memory(kernel, shared_bytes);
  // clang-format off
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
  check(cudaGetLastError(), "launch");
}

// How many blocks run at a time on the whole device. Cost: some microseconds; ask once.
template <typename Kernel>
int resident_blocks(Kernel kernel, int num_threads, size_t shared_bytes) {
  allow_shared_memory(kernel, shared_bytes);
  int device = 0, num_processors = 0, per_processor = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device), "attribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, num_threads, shared_bytes),
        "occupancy");
  return num_processors * (per_processor > 0 ? per_processor : 1);
}

#endif

}  // namespace engine::cuda
