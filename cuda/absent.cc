#include "device.h"

namespace engine::cuda {

bool is_compiled() { return false; }

int num_devices() { return 0; }

}  // namespace engine::cuda
