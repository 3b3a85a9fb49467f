// Instruction sets that the kernels are compiled for.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace engine::cpu {

// kAvx512Vnni is AVX-512 with the dot products of bytes that quantised weights want.
enum class Isa { kBaseline, kNeon, kAvx2, kAvx512, kAvx512Vnni };

const char* isa_name(Isa isa);

// Whether the kernels of the set may use vdpbf16ps, which machines have whatever else they have.
bool has_bf16_dot(Isa isa);
// Whether it multiplies more with it than by fma. Intel's machines take longer for it than for two of these.
bool has_fast_bf16_dot(Isa isa);

// Sets that both this build and this machine have, slowest first. Never empty.
std::vector<Isa> available_isas();

// "auto" gives the fastest available set. Throws kUnsupported, listing what there is, otherwise.
Isa parse_isa(std::string_view name);

}  // namespace engine::cpu
