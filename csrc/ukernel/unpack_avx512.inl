// Unpacking on AVX-512, to fp32.
#pragma once

#include "ukernel/unpack.inl"
#include "ukernel/vec_avx512.inl"

namespace {

struct Avx512Values {
  using V = F32x16;

  static __m128i load_bytes(const uint8_t* p, int64_t n) {
    if (n == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_maskz_loadu_epi8(first16(n), p);
  }
  // E4M3 as half precision of the 256th part, which has room for it: its exponent begins 8 earlier.
  static __m512i as_halves(__m256i bytes) {
    const __m512i wide = _mm512_cvtepu8_epi16(bytes);
    // Adding it once more moves the sign up.
    const __m512i half = _mm512_slli_epi16(_mm512_add_epi16(wide, _mm512_and_si512(wide, _mm512_set1_epi16(0x80))), 7);
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_add_epi16(half, half), _mm512_set1_epi16(0x7f00));
    return _mm512_mask_blend_epi16(nan, half, _mm512_set1_epi16(0x7e00));
  }
  static __m512 low_numbers(__m512i halves) { return _mm512_cvtph_ps(_mm512_castsi512_si256(halves)); }
  static __m512 high_numbers(__m512i halves) {
    return _mm512_cvtph_ps(_mm256_castps_si256(_mm512_extractf32x8_ps(_mm512_castsi512_ps(halves), 1)));
  }
  static __m512 from_e4m3(__m128i bytes) {
    return _mm512_mul_ps(low_numbers(as_halves(_mm256_castsi128_si256(bytes))), _mm512_set1_ps(256.0f));
  }
  static __m512 from_e8m0(__m128i bytes) {
    const __m512i wide = _mm512_cvtepu8_epi32(bytes), normal = _mm512_slli_epi32(wide, 23);
    const __mmask16 zero = _mm512_cmpeq_epi32_mask(wide, _mm512_setzero_si512());
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(255));
    const __m512i finite = _mm512_mask_mov_epi32(normal, zero, _mm512_set1_epi32(0x00400000));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(finite, nan, _mm512_set1_epi32(0x7fc00000)));
  }
  template <auto C>
  static __m512 bytes(const uint8_t* p, int64_t n) {
    const __m128i b = load_bytes(p, n);
    if constexpr (__is_same(decltype(C), Code))
      return C == Code::int8 ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)) : from_e4m3(b);
    else if constexpr (C == ScaleType::e8m0)
      return from_e8m0(b);
    else if constexpr (C == ScaleType::e4m3)
      return from_e4m3(b);
    else
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b));
  }
  static __m512 canonical(__m512 v) {
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_castps_si512(v), nan, _mm512_set1_epi32(0x7fc00000)));
  }
  // Their bits moved up, over the sign: the largest, and the least but zeros, which wrap.
  class Sizes {
   public:
    void add(__m512 v) {
      const __m512i size = _mm512_slli_epi32(_mm512_castps_si512(v), 1);
      most_ = _mm512_max_epu32(most_, size);
      least_ = _mm512_min_epu32(least_, _mm512_add_epi32(size, _mm512_set1_epi32(-1)));
    }
    bool ordinary() const {
      const __m512i most = _mm512_set1_epi32(static_cast<int>(moelora::kMostOrdinaryBits));
      const __m512i least = _mm512_set1_epi32(static_cast<int>(moelora::kLeastOrdinaryBits - 1));
      return _mm512_cmpeq_epi32_mask(_mm512_max_epu32(most_, most), most) == 0xffff &&
             _mm512_cmpeq_epi32_mask(_mm512_min_epu32(least_, least), least) == 0xffff;
    }

   private:
    __m512i most_ = _mm512_setzero_si512(), least_ = _mm512_set1_epi32(-1);
  };
  // The 16 numbers of a group, before they are rounded.
  static __m512 scaled(const float* values, float scale, const float* zero) {
    __m512 v = _mm512_loadu_ps(values);
    if (zero) v = _mm512_sub_ps(v, _mm512_set1_ps(*zero));
    return _mm512_mul_ps(v, _mm512_set1_ps(scale));
  }
  static __m512i rounding_to_bf16(__m512 v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  // Unlike the instruction for it this one keeps subnormals.
  static __m256i to_bf16(__m512 v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounding_to_bf16(v), 16)); }
  static constexpr int64_t kBlock = 32;
  template <Code C>
  static __m512 block_factor(float scale) {
    return _mm512_set1_ps(C == Code::int8 ? scale : 256.0f * scale);
  }
  // So many bytes as numbers times scale: ordinary ones.
  template <Code C>
  static void scaled_block(const uint8_t* codes, __m512 factor, __m512& low, __m512& high) {
    if constexpr (C == Code::int8) {
      low = _mm512_mul_ps(bytes<C>(codes, 16), factor);
      high = _mm512_mul_ps(bytes<C>(codes + 16, 16), factor);
    } else {
      const __m512i halves = as_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      low = _mm512_mul_ps(low_numbers(halves), factor);
      high = _mm512_mul_ps(high_numbers(halves), factor);
    }
  }
};

struct Avx512Unpack : Avx512Values {
  using elem = float;

  static __m512 round_as(__m512 v, float) { return v; }
  static __m512 round_as(__m512 v, bf16_t) {
    return _mm512_castsi512_ps(_mm512_and_si512(rounding_to_bf16(v), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static __m512 round_as(__m512 v, f16_t) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  // The same for ordinary products: a number so much larger leaves 8 bits of the significand when it is added.
  template <class T>
  static __m512 round_ordinary(__m512 v, T) {
    return round_as(v, T{});
  }
  static __m512 round_ordinary(__m512 v, bf16_t) {
    const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7f800000));
    const __m512 power = _mm512_castsi512_ps(exponent);
    const __m512 sum = _mm512_fmadd_ps(power, _mm512_set1_ps(0x1.8p16f), v);
    return _mm512_fmadd_ps(power, _mm512_set1_ps(-0x1.8p16f), sum);
  }
  template <class T>
  static void put(elem* to, __m512 v, int64_t n) {
    V::store_n(to, round_as(v, T{}), n);
  }
  template <Code C, class T>
  static void block(elem* to, const uint8_t* codes, __m512 factor) {
    __m512 low, high;
    scaled_block<C>(codes, factor, low, high);
    V::store(to, round_ordinary(low, T{}));
    V::store(to + 16, round_ordinary(high, T{}));
  }

  template <class T, bool Ordinary>
  struct Table;

  // Whole groups of a multiple of 32.
  template <class T, bool High>
  static void groups(elem* to, const uint8_t* codes, const float* values, const float* scales, const float* zeros,
                     int64_t group, int64_t n, int64_t ahead) {
    for (const elem* end = to + n; to < end; ++scales, to += group, codes += group / 2) {
      const Table<T, true> table(values, *scales, zeros);
      if (zeros) ++zeros;
      for (int64_t i = 0; i < group; i += 32) {
        fetch(codes + i / 2, ahead);
        table.template lookup_32<High>(to + i, codes + i / 2);
      }
    }
  }

  static constexpr int64_t kSmallGroup = 16;
  template <class T, bool High>
  static void small_groups(elem* to, const uint8_t* codes, const float* values, const float* scales, int64_t n,
                           int64_t ahead) {
    for (int64_t i = 0; i < n; i += 16, ++scales) {
      fetch(codes + i / 2, ahead);
      Table<T, true>(values, *scales, nullptr).template lookup_16<High>(to + i, codes + i / 2);
    }
  }

  template <class T, bool Ordinary>
  struct Table {
    __m512 numbers;

    Table(const float* values, float scale, const float* zero) {
      numbers = scaled(values, scale, zero);
      numbers = Ordinary ? round_ordinary(numbers, T{}) : round_as(numbers, T{});
    }
    float at(int i) const {
      alignas(64) float all[16];
      _mm512_store_ps(all, numbers);
      return all[i];
    }
    // Only the low four bits of an index count.
    template <bool High>
    __m512 numbers_of(__m128i codes) const {
      const __m512i pairs = _mm512_cvtepu8_epi64(codes);
      const __m512i index = High ? _mm512_or_si512(_mm512_srli_epi64(pairs, 4), _mm512_slli_epi64(pairs, 32))
                                 : _mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28));
      return _mm512_permutexvar_ps(index, numbers);
    }
    template <bool High>
    void lookup_16(elem* to, const uint8_t* codes) const {
      V::store(to, numbers_of<High>(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
    }
    template <bool High>
    void lookup_32(elem* to, const uint8_t* codes) const {
      lookup_16<High>(to, codes);
      lookup_16<High>(to + 16, codes + 8);
    }
    template <bool High>
    void lookup(elem* to, const uint8_t* codes, int64_t n) const {
      int64_t i = 0;
      for (; i + 16 <= n; i += 16) lookup_16<High>(to + i, codes + i / 2);
      if (i < n) V::store_n(to + i, numbers_of<High>(load_bytes(codes + i / 2, (n - i + 1) / 2)), n - i);
    }
  };
};

}  // namespace
