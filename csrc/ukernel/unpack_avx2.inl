// Unpacking to fp32 on AVX2.
#pragma once

#include "ukernel/unpack.inl"
#include "ukernel/vec_avx2.inl"

namespace {

struct Avx2Unpack {
  using V = F32x8;
  using elem = float;

  static __m128i load_bytes(const uint8_t* p, int64_t n) {
    if (n >= 8) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    uint64_t part = 0;
    __builtin_memcpy(&part, p, static_cast<uint64_t>(n));
    return _mm_cvtsi64_si128(static_cast<int64_t>(part));
  }
  // Half precision has room for E4M3, its exponent beginning 8 earlier.
  static __m256 from_e4m3(__m128i bytes) {
    const __m128i wide = _mm_cvtepu8_epi16(bytes), magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
    const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
    const __m128i half = _mm_or_si128(_mm_or_si128(sign, nan), _mm_slli_epi16(magnitude, 7));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
  }
  static __m256 from_e8m0(__m128i bytes) {
    const __m256i wide = _mm256_cvtepu8_epi32(bytes), normal = _mm256_slli_epi32(wide, 23);
    const __m256i zero = _mm256_cmpeq_epi32(wide, _mm256_setzero_si256());
    const __m256i least = _mm256_and_si256(zero, _mm256_set1_epi32(0x00400000));
    const __m256i nan = _mm256_cmpeq_epi32(wide, _mm256_set1_epi32(255));
    return _mm256_castsi256_ps(
        _mm256_or_si256(_mm256_or_si256(normal, least), _mm256_and_si256(nan, _mm256_set1_epi32(0x7fc00000))));
  }
  template <auto C>
  static __m256 bytes(const uint8_t* p, int64_t n) {
    const __m128i b = load_bytes(p, n);
    if constexpr (__is_same(decltype(C), Code))
      return C == Code::int8 ? _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)) : from_e4m3(b);
    else if constexpr (C == ScaleType::e8m0)
      return from_e8m0(b);
    else if constexpr (C == ScaleType::e4m3)
      return from_e4m3(b);
    else
      return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b));
  }
  static __m256 canonical(__m256 v) {
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(v, nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }

  static __m256i rounding_to_bf16(__m256 v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  static __m256 round_as(__m256 v, float) { return v; }
  static __m256 round_as(__m256 v, bf16_t) {
    return _mm256_castsi256_ps(_mm256_and_si256(rounding_to_bf16(v), _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static __m256 round_as(__m256 v, f16_t) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  template <class T>
  static void put(elem* to, __m256 v, int64_t n) {
    V::store_n(to, round_as(v, T{}), n);
  }

  // The 16 numbers of a group, before they are rounded.
  struct Scaled {
    __m256 low, high;

    Scaled(const float* values, float scale, const float* zero) {
      low = _mm256_loadu_ps(values);
      high = _mm256_loadu_ps(values + 8);
      if (zero) {
        low = _mm256_sub_ps(low, _mm256_set1_ps(*zero));
        high = _mm256_sub_ps(high, _mm256_set1_ps(*zero));
      }
      low = _mm256_mul_ps(low, _mm256_set1_ps(scale));
      high = _mm256_mul_ps(high, _mm256_set1_ps(scale));
    }
  };

  template <class T>
  struct Table;

  // Nibbles one by one.
  template <bool High, class Numbers>
  static void lookup_rest(const Numbers& numbers, elem* to, const uint8_t* codes, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = numbers.at(codes[i / 2] >> ((i % 2 == 0) == High ? 4 : 0) & 15);
  }
};

template <>
struct Avx2Unpack::Table<float> {
  __m256 low, high;

  Table(const float* values, float scale, const float* zero) {
    const Scaled all(values, scale, zero);
    low = all.low;
    high = all.high;
  }
  float at(int i) const { return i < 8 ? low[i] : high[i - 8]; }

  template <bool High>
  void lookup(elem* to, const uint8_t* codes, int64_t n) const {
    const __m256i shifts =
        High ? _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24) : _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      int four;
      __builtin_memcpy(&four, codes + i / 2, 4);
      const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(four), shifts);
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      _mm256_storeu_ps(
          to + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper));
    }
    lookup_rest<High>(*this, to + i, codes + i / 2, n - i);
  }
};

// 16-bit numbers: their bytes are looked up.
template <class T>
struct Avx2Unpack::Table {
  static constexpr bool kHalf = __is_same(T, f16_t);
  __m256i low_bytes, high_bytes;  // of each number, twice

  Table(const float* values, float scale, const float* zero) {
    const Scaled all(values, scale, zero);
    const __m256i words = as_words(all, T{});
    const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16(words, 8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
    low_bytes = _mm256_permute4x64_epi64(bytes, 0x44);
    high_bytes = _mm256_permute4x64_epi64(bytes, 0xee);
  }
  static __m256i as_words(const Scaled& all, bf16_t) {
    const __m256i low = _mm256_srli_epi32(rounding_to_bf16(all.low), 16);
    const __m256i high = _mm256_srli_epi32(rounding_to_bf16(all.high), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  }
  static __m256i as_words(const Scaled& all, f16_t) {
    return _mm256_set_m128i(_mm256_cvtps_ph(all.high, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(all.low, _MM_FROUND_TO_NEAREST_INT));
  }
  float at(int i) const {
    alignas(32) uint8_t low[32], high[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(low), low_bytes);
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), high_bytes);
    return moelora::to_float(T{static_cast<uint16_t>(high[i] << 8 | low[i])});
  }

  // Sixteen bytes of codes in the order in which numbers come out of `store`, each byte twice.
  static __m256i spread(__m128i codes) {
    const __m256i order = kHalf ? _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11, 4, 4, 5, 5, 6, 6,
                                                   7, 7, 12, 12, 13, 13, 14, 14, 15, 15)
                                : _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 2, 2, 3, 3, 6, 6,
                                                   7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(codes), order);
  }
  // Sixteen numbers.
  static void store(elem* to, __m256i words) {
    if constexpr (kHalf) {
      _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm256_castsi256_si128(words)));
      _mm256_storeu_ps(to + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1)));
    } else {
      const __m256i none = _mm256_setzero_si256();
      _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, words)));
      _mm256_storeu_ps(to + 8, _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, words)));
    }
  }

  template <bool High>
  [[gnu::always_inline]] void lookup_bytes(__m128i codes, __m256i& low, __m256i& high) const {
    const __m256i twice = spread(codes), shifted = _mm256_srli_epi16(twice, 4);
    const __m256i even = _mm256_set1_epi16(0x000f), odd = _mm256_set1_epi16(0x0f00);
    const __m256i index =
        _mm256_or_si256(_mm256_and_si256(High ? shifted : twice, even), _mm256_and_si256(High ? twice : shifted, odd));
    low = _mm256_shuffle_epi8(low_bytes, index);
    high = _mm256_shuffle_epi8(high_bytes, index);
  }

  template <bool High>
  void lookup(elem* to, const uint8_t* codes, int64_t n) const {
    int64_t i = 0;
    __m256i low, high;
    for (; i + 32 <= n; i += 32) {
      lookup_bytes<High>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)), low, high);
      store(to + i, _mm256_unpacklo_epi8(low, high));
      store(to + i + 16, _mm256_unpackhi_epi8(low, high));
    }
    if (i + 16 <= n) {
      lookup_bytes<High>(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)), low, high);
      store(to + i, _mm256_unpacklo_epi8(low, high));
      i += 16;
    }
    lookup_rest<High>(*this, to + i, codes + i / 2, n - i);
  }
};

}  // namespace
