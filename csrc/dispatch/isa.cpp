#include "dispatch/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace moelora {
namespace {

#if defined(__x86_64__)
bool detect(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return detect(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::avx512_bf16: return detect(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx_bf16: return false;
  }
  return false;
}
#else
bool detect(Isa isa) { return isa == Isa::portable; }
#endif

bool built(Isa isa) {
  switch (isa) {
    case Isa::portable: return true;
#ifdef MOELORA_BUILT_avx2
    case Isa::avx2: return true;
#endif
#ifdef MOELORA_BUILT_avx512
    case Isa::avx512: return true;
#endif
#ifdef MOELORA_BUILT_avx512_bf16
    case Isa::avx512_bf16: return true;
#endif
    default: return false;
  }
}

std::vector<IsaState> examine() {
  std::vector<IsaState> states;
  for (Isa isa : kIsas) {
    IsaState s{isa, built(isa), detect(isa), true, ""};
    if (!s.built)
      s.reason = "not built into this binary";
    else if (!s.detected)
      s.reason = "this CPU or operating system does not offer it";
    states.push_back(s);
  }
  return states;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::amx_bf16: return "amx_bf16";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

const std::vector<IsaState>& isa_states() {
  static const std::vector<IsaState> states = examine();
  return states;
}

const std::string& isa_override() {
  static const std::string value = [] {
    const char* text = std::getenv("MOELORA_ISA");
    return std::string(text ? text : "");
  }();
  return value;
}

Isa chosen_isa() {
  const std::string& wanted = isa_override();
  std::string usable;
  for (const IsaState& s : isa_states()) {
    if (s.usable()) {
      if (wanted.empty() || wanted == name_of(s.isa)) return s.isa;
      usable += std::string(usable.empty() ? "" : ", ") + name_of(s.isa);
    } else if (wanted == name_of(s.isa)) {
      throw std::runtime_error("MOELORA_ISA=" + wanted + " cannot run here: " + s.reason);
    }
  }
  throw std::runtime_error("MOELORA_ISA must be one of " + usable + " on this machine, got \"" + wanted + "\"");
}

}  // namespace moelora
