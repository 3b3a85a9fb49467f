// What the build and the machine know of CUDA. absent.cc answers when built without it.
#pragma once

namespace engine::cuda {

// Whether this build contains the CUDA backend.
bool is_compiled();

// Number of usable GPUs; 0 without a driver.
int num_devices();

}  // namespace engine::cuda
