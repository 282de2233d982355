// Unpacking on AVX-512: to fp32, or to bf16 for its dot products.
#pragma once

#include "ukernel/unpack.inl"
#include "ukernel/vec_avx512.inl"

namespace {

struct Avx512Values {
  using V = F32x16;

  static __m128i load_bytes(const uint8_t* p, int64_t n) { return _mm_maskz_loadu_epi8(first16(n), p); }
  // Half precision has room for E4M3, its exponent beginning 8 earlier.
  static __m512 from_e4m3(__m128i bytes) {
    const __m256i wide = _mm256_cvtepu8_epi16(bytes), magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m256i nan =
        _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7e00));
    const __m256i half = _mm256_or_si256(_mm256_or_si256(sign, nan), _mm256_slli_epi16(magnitude, 7));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
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
};

struct Avx512Unpack : Avx512Values {
  using elem = float;

  static __m512 round_as(__m512 v, float) { return v; }
  static __m512 round_as(__m512 v, bf16_t) {
    return _mm512_castsi512_ps(_mm512_and_si512(rounding_to_bf16(v), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static __m512 round_as(__m512 v, f16_t) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  template <class T>
  static void put(elem* to, __m512 v, int64_t n) {
    V::store_n(to, round_as(v, T{}), n);
  }

  template <class T>
  struct Table {
    __m512 numbers;

    Table(const float* values, float scale, const float* zero) : numbers(round_as(scaled(values, scale, zero), T{})) {}
    float at(int i) const {
      alignas(64) float all[16];
      _mm512_store_ps(all, numbers);
      return all[i];
    }
    // Only the low four bits of an index count.
    template <bool High>
    void lookup(elem* to, const uint8_t* codes, int64_t n) const {
      for (int64_t i = 0; i < n; i += 16) {
        const int64_t left = n - i;
        const __m512i pairs = _mm512_cvtepu8_epi64(load_bytes(codes + i / 2, left < 16 ? (left + 1) / 2 : 8));
        const __m512i index = High ? _mm512_or_si512(_mm512_srli_epi64(pairs, 4), _mm512_slli_epi64(pairs, 32))
                                   : _mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28));
        V::store_n(to + i, _mm512_permutexvar_ps(index, numbers), left);
      }
    }
  };
};

struct Bf16Unpack : Avx512Values {
  using elem = bf16_t;

  template <class>
  static void put(elem* to, __m512 v, int64_t n) {
    _mm256_mask_storeu_epi16(to, first16(n), to_bf16(v));
  }

  template <class>
  struct Table {
    __m512i numbers;  // twice

    Table(const float* values, float scale, const float* zero)
        : numbers(_mm512_broadcast_i64x4(to_bf16(scaled(values, scale, zero)))) {}
    bf16_t at(int i) const {
      alignas(64) bf16_t all[32];
      _mm512_store_si512(all, numbers);
      return all[i];
    }
    // Only the low five bits of an index count.
    template <bool High>
    void lookup(elem* to, const uint8_t* codes, int64_t n) const {
      for (int64_t i = 0; i < n; i += 32) {
        const int64_t left = n - i;
        const __m512i pairs = _mm512_cvtepu8_epi32(load_bytes(codes + i / 2, left < 32 ? (left + 1) / 2 : 16));
        const __m512i index = High ? _mm512_or_si512(_mm512_srli_epi32(pairs, 4), _mm512_slli_epi32(pairs, 16))
                                   : _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
        const __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
        _mm512_mask_storeu_epi16(to + i, mask, _mm512_permutexvar_epi16(index, numbers));
      }
    }
  };
};

}  // namespace
