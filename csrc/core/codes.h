// How packed weights store numbers and scales.
#pragma once

#include <cstdint>

namespace moelora {

// What stands for a number. Nibbles are two a byte, the first one of a pair in the high or the low half, and say which
// of 16 values is meant.
enum class Code : uint8_t { nibbles_high, nibbles_low, int8, e4m3 };
constexpr int kCodes = 4;
static inline constexpr int bits_of(Code code) {
  return code == Code::nibbles_high || code == Code::nibbles_low ? 4 : 8;
}

// How a scale or a zero point is stored. indexed: a byte that says which of 256 values is meant.
enum class ScaleType : uint8_t { f32, bf16, f16, e8m0, e4m3, u8, indexed };
constexpr int kScaleTypes = 7;
static inline constexpr int64_t size_of(ScaleType t) {
  return t == ScaleType::f32 ? 4 : t == ScaleType::bf16 || t == ScaleType::f16 ? 2 : 1;
}

}  // namespace moelora
