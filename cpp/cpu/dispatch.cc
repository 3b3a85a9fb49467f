#include "cpu/dispatch.h"

#include "engine/error.h"

namespace engine::cpu {

#if ENGINE_HAS_baseline
namespace baseline {
extern const KernelTable kTable;
}
#endif
#if ENGINE_HAS_neon
namespace neon {
extern const KernelTable kTable;
}
#endif
#if ENGINE_HAS_avx2
namespace avx2 {
extern const KernelTable kTable;
}
#endif
#if ENGINE_HAS_avx512
namespace avx512 {
extern const KernelTable kTable;
}
#endif
#if ENGINE_HAS_avx512_vnni
namespace avx512_vnni {
extern const KernelTable kTable;
}
#endif

const KernelTable& kernels_for(Isa isa) {
  switch (isa) {
    case Isa::kBaseline: return baseline::kTable;
#if ENGINE_HAS_neon
    case Isa::kNeon: return neon::kTable;
#endif
#if ENGINE_HAS_avx2
    case Isa::kAvx2: return avx2::kTable;
#endif
#if ENGINE_HAS_avx512
    case Isa::kAvx512: return avx512::kTable;
#endif
#if ENGINE_HAS_avx512_vnni
    case Isa::kAvx512Vnni: return avx512_vnni::kTable;
#endif
    default: break;
  }
  throw Error(ErrorCode::kUnsupported, std::string("isa: not in this build: ") + isa_name(isa));
}

}  // namespace engine::cpu
