#include "device.h"

#include <cuda_runtime.h>

namespace engine::cuda {

bool is_compiled() { return true; }

int num_devices() {
  int count = 0;
  // A machine without a driver reports an error here; that is an answer, not a failure.
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace engine::cuda
