// Unpacking on any CPU.
#pragma once

#include "ukernel/unpack.inl"
#include "ukernel/vec_portable.inl"

namespace {

inline float e4m3_value(uint8_t byte) {
  const uint32_t sign = uint32_t{byte & 0x80u} << 24, magnitude = byte & 0x7fu;
  if (magnitude == 0x7f) return moelora::bit_cast<float>(sign | 0x7fc00000u);
  // The exponent is rebased by a multiplication, which also normalises subnormals.
  return moelora::bit_cast<float>(sign |
                                  moelora::bit_cast<uint32_t>(moelora::bit_cast<float>(magnitude << 20) * 0x1p120f));
}

inline float e8m0_value(uint8_t byte) {
  if (byte == 255) return moelora::bit_cast<float>(0x7fc00000u);
  return moelora::bit_cast<float>(byte == 0 ? 0x00400000u : uint32_t{byte} << 23);
}

template <auto C>
inline float byte_value(uint8_t byte) {
  if constexpr (__is_same(decltype(C), Code))
    return C == Code::int8 ? static_cast<float>(static_cast<int8_t>(byte)) : e4m3_value(byte);
  else if constexpr (C == ScaleType::e8m0)
    return e8m0_value(byte);
  else if constexpr (C == ScaleType::e4m3)
    return e4m3_value(byte);
  else
    return byte;
}

struct PortableUnpack {
  using V = PortableVec<float, 4>;
  using elem = float;

  static float round_as(float v, float) { return v; }
  static float round_as(float v, bf16_t) { return moelora::to_float(moelora::to_bf16(v)); }
  static float round_as(float v, f16_t) { return moelora::to_float(moelora::to_f16(v)); }

  template <auto C>
  static V::vec bytes(const uint8_t* p, int64_t n) {
    V::vec v{};
    for (int i = 0; i < V::lanes; ++i)
      if (i < n) v[i] = byte_value<C>(p[i]);
    return v;
  }
  static V::vec canonical(V::vec v) {
    for (int i = 0; i < V::lanes; ++i)
      if (v[i] != v[i]) v[i] = moelora::bit_cast<float>(0x7fc00000u);
    return v;
  }
  class Sizes {
   public:
    void add(V::vec v) {
      for (int i = 0; i < V::lanes; ++i) {
        const float size = v[i] < 0 ? -v[i] : v[i];
        if (size != 0 && !(size >= moelora::kLeastOrdinary && size <= moelora::kMostOrdinary)) all_ = false;
      }
    }
    bool ordinary() const { return all_; }

   private:
    bool all_ = true;
  };
  template <class T>
  static void put(elem* to, V::vec v, int64_t n) {
    for (int i = 0; i < V::lanes; ++i)
      if (i < n) to[i] = round_as(v[i], T{});
  }

  template <class T, bool>
  struct Table {
    float numbers[16];

    Table(const float* values, float scale, const float* zero) {
      for (int i = 0; i < 16; ++i) numbers[i] = round_as((zero ? values[i] - *zero : values[i]) * scale, T{});
    }
    float at(int i) const { return numbers[i]; }
    template <bool High>
    void lookup(elem* to, const uint8_t* codes, int64_t n) const {
      for (int64_t i = 0; i < n; ++i) {
        const int shift = (i % 2 == 0) == High ? 4 : 0;
        to[i] = numbers[codes[i / 2] >> shift & 15];
      }
    }
  };
};

}  // namespace
