// Which instruction sets can run here: usable = built ∧ detected ∧ permitted.
#pragma once

#include <string>
#include <vector>

namespace moelora {

// Best first.
enum class Isa { amx_bf16, avx512_bf16, avx512, avx2, portable };
constexpr Isa kIsas[] = {Isa::amx_bf16, Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::portable};

const char* name_of(Isa isa);

struct IsaState {
  Isa isa;
  bool built, detected, permitted;
  std::string reason;  // why it is not usable; empty where it is
  bool usable() const { return built && detected && permitted; }
};

// One entry per instruction set, best first. Computed once.
const std::vector<IsaState>& isa_states();

// Value of MOELORA_ISA, empty when unset.
const std::string& isa_override();

// The best usable instruction set at or below MOELORA_ISA.
// Throws std::runtime_error when MOELORA_ISA names an unknown one or one that cannot run here.
Isa chosen_isa();

// Whether this CPU reads memory fastest if it is fetched into L1: where that keeps enough misses in flight.
// Zen 5 does; Zen 4 reads a fifth more into L2. Others, not measured, are taken to be like it.
bool reads_fastest_to_l1();

}  // namespace moelora
