// Storage types and their scalar conversions. No torch, no intrinsics.
//
// Everything is `static inline`: instruction-set units include this header, and a function with external
// linkage compiled with wider flags there could be the copy the linker keeps for everyone.
#pragma once

#include <cstdint>
#include <cstring>

namespace moelora {

enum class DType : uint8_t { bf16 = 0, f16 = 1, f32 = 2, f64 = 3 };
constexpr int kDTypes = 4;

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

static inline constexpr int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

static inline const char* name_of(DType t) {
  switch (t) {
    case DType::bf16: return "bf16";
    case DType::f16: return "fp16";
    case DType::f32: return "fp32";
    default: return "fp64";
  }
}

template <class To, class From>
static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

static inline float to_float(bf16_t v) { return bit_cast<float>(uint32_t{v.bits} << 16); }

// Round to nearest, ties to even; NaN stays NaN.
static inline bf16_t to_bf16(float v) {
  uint32_t u = bit_cast<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

static inline float to_float(f16_t v) {
  uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // The exponent is rebased by a multiplication, which also normalises half's subnormals.
  float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
}

static inline f16_t to_f16(float v) {
  uint32_t u = bit_cast<uint32_t>(v);
  uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (u >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or beyond
  if (u < 0x38800000u) {
    // Adding 0.5 aligns the mantissa to half's subnormal grid and rounds it there.
    float aligned = bit_cast<float>(u) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000u))};
  }
  u += 0xc8000fffu + ((u >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (u >> 13))};
}

}  // namespace moelora
