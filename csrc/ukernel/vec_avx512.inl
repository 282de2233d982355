// AVX-512 vectors of 16 fp32 lanes.
#pragma once

#include <immintrin.h>

#include "ukernel/ukernel.h"

namespace {

using moelora::bf16_t;
using moelora::f16_t;

inline __mmask16 first16(int64_t n) {
  return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1u);
}

// 16 x 16 transpose of 32-bit elements: pairs, quads, then 128-bit blocks.
inline void transpose_16x16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

struct F32x16 {
  using acc_t = float;
  using vec = __m512;
  static constexpr int lanes = 16;
  static constexpr bool widens = true;
  static constexpr int widest = 4;
  static constexpr int sums = 24;
  static constexpr int dot_rows[] = {8, 8, 8, 6, 4, 4};

  static __m256 low_half(vec v) { return _mm512_castps512_ps256(v); }
  static vec zero() { return _mm512_setzero_ps(); }
  static vec set1(float v) { return _mm512_set1_ps(v); }
  static vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
  static vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
  static vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(vec a) { return _mm512_reduce_add_ps(a); }

  static vec load(const float* p) { return _mm512_loadu_ps(p); }
  static vec load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first16(n), p); }
  static vec load_n(const bf16_t* p, int64_t n) {
    const __m256i v = _mm256_maskz_loadu_epi16(first16(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static vec load_n(const f16_t* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(n), p)); }
  // From register to register: a vector loaded from where its lanes were just stored would wait for them.
  static vec pick(const float* v, const uint8_t* at) {
    return _mm512_setr_ps(v[at[0]], v[at[1]], v[at[2]], v[at[3]], v[at[4]], v[at[5]], v[at[6]], v[at[7]], v[at[8]],
                          v[at[9]], v[at[10]], v[at[11]], v[at[12]], v[at[13]], v[at[14]], v[at[15]]);
  }
  static void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
  static void store_n(float* p, vec v, int64_t n) { _mm512_mask_storeu_ps(p, first16(n), v); }
  static void store_n(bf16_t* p, vec v, int64_t n) { _mm256_mask_storeu_epi16(p, first16(n), to_bf16x16(v)); }
  static void store_n(f16_t* p, vec v, int64_t n) {
    _mm256_mask_storeu_epi16(p, first16(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static void sum_of_four(vec a, vec b, vec c, vec d, float* sums) {
    const vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const vec v = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }

  static __m256i to_bf16x16(vec v) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
  }

  static void transpose(vec (&v)[16]) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(v[i]);
    transpose_16x16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = _mm512_castsi512_ps(r[i]);
  }
};

}  // namespace
