// AVX2 + FMA + F16C vectors of 8 fp32 lanes.
#pragma once

#include <immintrin.h>

#include "ukernel/ukernel.h"

namespace {

using moelora::bf16_t;
using moelora::f16_t;

struct F32x8 {
  using acc_t = float;
  using vec = __m256;
  static constexpr int lanes = 8;
  static constexpr bool widens = true;
  static constexpr int widest = 3;
  static constexpr int sums = 12;
  static constexpr int dot_rows[] = {6, 4, 3, 3, 2, 2};

  static void keep(vec& v) { asm("" : "+x"(v)); }
  static vec zero() { return _mm256_setzero_ps(); }
  static vec set1(float v) { return _mm256_set1_ps(v); }
  static vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
  static vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
  static vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(vec a) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
  }

  static __m256i first8(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n > 8 ? 8 : n)), lane);
  }
  // Eight 16-bit elements; those from n on are zero and not read.
  static __m128i load_16bit(const void* p, int64_t n) {
    if (n >= 8) return _mm_loadu_si128(static_cast<const __m128i*>(p));
    alignas(16) uint16_t part[8] = {};
    __builtin_memcpy(part, p, static_cast<uint64_t>(n) * 2);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(part));
  }
  static void store_16bit(void* p, __m128i v, int64_t n) {
    if (n >= 8) return _mm_storeu_si128(static_cast<__m128i*>(p), v);
    alignas(16) uint16_t part[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(part), v);
    __builtin_memcpy(p, part, static_cast<uint64_t>(n) * 2);
  }

  static vec load(const float* p) { return _mm256_loadu_ps(p); }
  static vec load_n(const float* p, int64_t n) {
    return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first8(n));
  }
  static vec load_n(const bf16_t* p, int64_t n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16bit(p, n)), 16));
  }
  static vec load_n(const f16_t* p, int64_t n) { return _mm256_cvtph_ps(load_16bit(p, n)); }
  // From register to register: a vector loaded from where its lanes were just stored would wait for them.
  static vec pick(const float* v, const uint8_t* at) {
    return _mm256_setr_ps(v[at[0]], v[at[1]], v[at[2]], v[at[3]], v[at[4]], v[at[5]], v[at[6]], v[at[7]]);
  }
  static void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
  static void store_n(float* p, vec v, int64_t n) {
    if (n >= 8) return _mm256_storeu_ps(p, v);
    _mm256_maskstore_ps(p, first8(n), v);
  }
  static void store_n(bf16_t* p, vec v, int64_t n) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i wide = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
    store_16bit(p, _mm256_castsi256_si128(packed), n);
  }
  static void store_n(f16_t* p, vec v, int64_t n) { store_16bit(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), n); }

  static void sum_of_four(vec a, vec b, vec c, vec d, float* sums) {
    const vec ab = _mm256_hadd_ps(a, b), cd = _mm256_hadd_ps(c, d), v = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
  }

  static void transpose(vec (&v)[8]) {
    vec t[8], q[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      q[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      q[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      q[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      q[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2f128_ps(q[i], q[4 + i], 0x20);
      v[4 + i] = _mm256_permute2f128_ps(q[i], q[4 + i], 0x31);
    }
  }
};

}  // namespace
