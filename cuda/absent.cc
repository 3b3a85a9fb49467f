#include "device.h"
#include "engine/error.h"
#include "launchers.h"

namespace engine::cuda {
namespace {

[[noreturn]] void refuse() {
  throw Error(ErrorCode::kUnsupported, "this build has no CUDA backend: install where nvcc is found");
}

}  // namespace

bool is_compiled() { return false; }

int num_devices() { return 0; }

void decode_attention(const DecodeArgs&, void*) { refuse(); }
void append_kv(const AppendKvArgs&, const RotationArgs*, void*) { refuse(); }

}  // namespace engine::cuda
