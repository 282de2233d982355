#include "dispatch/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#define MOELORA_LINUX_X86
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif

namespace moelora {
namespace {

#ifdef MOELORA_LINUX_X86
// The symbol of a library that performs tile instructions where the CPU has none: how tests run them on any x86-64.
bool amx_emulated() {
  static const bool found = dlsym(RTLD_DEFAULT, "moelora_amx_emulated") != nullptr;
  return found;
}

std::string amx_missing() {
  if (amx_emulated()) return "";
  unsigned a = 0, b = 0, c = 0, d = 0;
  const unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, osxsave = 1u << 27;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile))
    return "this CPU has no AMX (CPUID: amx-tile, amx-bf16)";
  unsigned states = 0, high = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) && (c & osxsave)) asm volatile("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
  if ((states >> 17 & 3) != 3) return "the operating system does not keep AMX state (XCR0 bits 17 and 18)";
  return "";
}

// Linux grants the state of the tiles to a process that asks; threads and forks inherit it.
std::string amx_refused() {
  if (amx_emulated()) return "";
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequest, kTileData) == 0) return "";
  return std::string("Linux refused the use of AMX tiles (arch_prctl ARCH_REQ_XCOMP_PERM): ") + std::strerror(errno);
}
#else
[[maybe_unused]] std::string amx_missing() { return "AMX is used on Linux only"; }
std::string amx_refused() { return ""; }
#endif

#if defined(__x86_64__)
// clang 16's __builtin_cpu_supports does not know it. The registers are AVX's, whose state avx2 vouches for.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// In a build for tests the wide units make do with AVX2.
constexpr bool kWideEmulated = MOELORA_WIDE_EMULATED;

// Why the CPU or the operating system does not offer it; empty where they do.
std::string missing(Isa isa) {
#if defined(__x86_64__)
  const auto unless = [&](bool offered) {
    return std::string(offered ? "" : "this CPU or operating system does not offer it");
  };
  __builtin_cpu_init();
  switch (isa) {
    case Isa::portable: return "";
    case Isa::avx2: return unless(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c());
    case Isa::avx512:
      return unless(missing(Isa::avx2).empty() &&
                    (kWideEmulated || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))));
    case Isa::avx512_bf16:
      return unless(missing(Isa::avx512).empty() && (kWideEmulated || __builtin_cpu_supports("avx512bf16")));
    case Isa::amx_bf16:
      return missing(Isa::avx512_bf16).empty() ? amx_missing() : "it needs avx512_bf16 beside it, which is not offered";
  }
#endif
  return isa == Isa::portable ? "" : "this CPU or operating system does not offer it";
}

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
#ifdef MOELORA_BUILT_amx_bf16
    case Isa::amx_bf16: return true;
#endif
    default: return false;
  }
}

std::vector<IsaState> examine() {
  std::vector<IsaState> states;
  for (Isa isa : kIsas) {
    const std::string lacks = missing(isa);
    IsaState s{isa, built(isa), lacks.empty(), true, lacks};
    if (!s.built) {
      s.reason = "not built into this binary";
    } else if (s.detected && isa == Isa::amx_bf16) {
      s.reason = amx_refused();
      s.permitted = s.reason.empty();
    }
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

bool reads_fastest_to_l1() {
#if defined(__x86_64__)
  constexpr unsigned kZen5 = 0x1a;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  return (a >> 8 & 0xf) + (a >> 20 & 0xff) >= kZen5;  // family and what is added to it
#else
  return false;
#endif
}

}  // namespace moelora
