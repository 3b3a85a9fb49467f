#include "cpu/isa.h"

#include "engine/error.h"

namespace engine::cpu {
namespace {

bool machine_has(Isa isa) {
  switch (isa) {
    case Isa::kBaseline: return true;
    case Isa::kNeon: return true;  // part of the AArch64 baseline, and only built there
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             machine_has(Isa::kAvx2);
    case Isa::kAvx512Vnni: return __builtin_cpu_supports("avx512vnni") && machine_has(Isa::kAvx512);
#else
    case Isa::kAvx2:
    case Isa::kAvx512:
    case Isa::kAvx512Vnni: return false;
#endif
  }
  return false;
}

constexpr Isa kBuilt[] = {
    Isa::kBaseline,
#if ENGINE_HAS_neon
    Isa::kNeon,
#endif
#if ENGINE_HAS_avx2
    Isa::kAvx2,
#endif
#if ENGINE_HAS_avx512
    Isa::kAvx512,
#endif
#if ENGINE_HAS_avx512_vnni
    Isa::kAvx512Vnni,
#endif
};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kBaseline: return "baseline";
    case Isa::kNeon: return "neon";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Vnni: return "avx512_vnni";
  }
  return "unknown";
}

bool has_bf16_dot(Isa isa) {
#if defined(__x86_64__)
  static const bool kMachineHas = __builtin_cpu_supports("avx512bf16");
  return kMachineHas && (isa == Isa::kAvx512 || isa == Isa::kAvx512Vnni);
#else
  (void)isa;
  return false;
#endif
}

bool has_fast_bf16_dot(Isa isa) {
#if defined(__x86_64__)
  static const bool kIsIntel = __builtin_cpu_is("intel");
  return has_bf16_dot(isa) && !kIsIntel;
#else
  return has_bf16_dot(isa);
#endif
}

std::vector<Isa> available_isas() {
  std::vector<Isa> available;
  for (Isa isa : kBuilt) {
    if (machine_has(isa)) available.push_back(isa);
  }
  return available;
}

Isa parse_isa(std::string_view name) {
  const std::vector<Isa> available = available_isas();
  if (name == "auto") return available.back();
  std::string names;
  for (Isa isa : available) {
    if (name == isa_name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw Error(ErrorCode::kUnsupported, "instruction set (isa): this machine and build have " + names +
                                           ", got '" + std::string(name) + "'");
}

}  // namespace engine::cpu
