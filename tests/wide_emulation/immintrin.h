// AVX-512 (F, BW, VL, DQ; BF16 too with MOELORA_EMULATE_BF16) on AVX2, FMA and F16C, for tests on CPUs that have no
// more.
//
// Stands before the compiler's <immintrin.h> and declares its AVX2 part and, of AVX-512, what csrc/ukernel uses: the
// use of anything else does not compile. A 512-bit vector is two halves in the layout of the real one. Results are
// those of the real instructions, bit for bit: tests/test_wide_emulation.py compares each where a CPU has both.
//
// Seen there on Intel's Sapphire Rapids, and as Intel's manual has it:
//
// vdpbf16ps         adds to a lane the product of the odd elements, then that of the even ones: two fused
//                   multiply-adds, rounded to nearest even whatever MXCSR says. Subnormal elements, sums and results
//                   count as zeros of their sign; a result is subnormal if it is less than 2^-126 once rounded to 24
//                   bits. Of several NaNs comes out the first of even a, even b, odd a, odd b, the sum, made quiet.
// vcvtne(2)ps2bf16  round to nearest even whatever MXCSR says; subnormals become zeros of their sign; a NaN keeps its
//                   sign and upper payload and becomes quiet.
// Masked loads and stores touch no memory outside their mask; aligned ones fault at other addresses.
#pragma once

// The guards of the compilers' own header, which says "include immintrin.h instead" to whoever includes its parts.
#ifdef __clang__
#define __IMMINTRIN_H
#else
#define _IMMINTRIN_H_INCLUDED
#include <x86gprintrin.h>
#endif
// clang-format off
#include <smmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <fmaintrin.h>
#include <f16cintrin.h>
// clang-format on
#include <stdint.h>

#ifdef __AVX512F__
#error "the emulation is for units compiled without AVX-512"
#endif

#define EMULATED [[gnu::always_inline]] static inline

// Two halves. One becomes another by a cast, as the real types do.
#define WIDE(name, Half)                                                                                    \
  struct alignas(64) name {                                                                                 \
    Half low, high;                                                                                         \
    name() = default;                                                                                       \
    [[gnu::always_inline]] name(Half l, Half h) : low(l), high(h) {}                                        \
    template <class Other>                                                                                  \
    [[gnu::always_inline]] explicit name(const Other& bits) : low((Half)bits.low), high((Half)bits.high) {} \
  };
WIDE(__m512, __m256)
WIDE(__m512d, __m256d)
WIDE(__m512i, __m256i)
#ifdef MOELORA_EMULATE_BF16
#define __AVX512BF16__ 1
#define __m256bh __m256i
WIDE(__m512bh, __m256i)
#endif
#undef WIDE
using __mmask8 = uint8_t;
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
using __mmask64 = uint64_t;

// --- what the tables below are made of

namespace wide {
namespace {

EMULATED __m128 lower(__m256 v) { return _mm256_castps256_ps128(v); }
EMULATED __m128 upper(__m256 v) { return _mm256_extractf128_ps(v, 1); }
EMULATED __m128i lower(__m256i v) { return _mm256_castsi256_si128(v); }
EMULATED __m128i upper(__m256i v) { return _mm256_extracti128_si256(v, 1); }
EMULATED __m128i lower(__m128i v) { return v; }
EMULATED __m128i upper(__m128i v) { return _mm_unpackhi_epi64(v, v); }
EMULATED __m256i joined(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

template <class V>
EMULATED V read(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
EMULATED void write(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}
EMULATED void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
}

// A vector V as elements T.
template <class T, class V>
struct Elements {
  static constexpr int n = sizeof(V) / sizeof(T);
  static constexpr uint64_t all = ~uint64_t{0} >> (64 - n);
  T at[n];

  Elements() : at{} {}
  explicit Elements(V v) { __builtin_memcpy(at, &v, sizeof v); }
  V vector() const { return read<V>(at); }
};

template <class T, class V>
inline V read_masked(uint64_t mask, const void* from) {
  using E = Elements<T, V>;
  if (mask == E::all) return read<V>(from);
  E v;
  for (int i = 0; i < E::n; ++i)
    if (mask >> i & 1) __builtin_memcpy(&v.at[i], static_cast<const T*>(from) + i, sizeof(T));
  return v.vector();
}
template <class T, class V>
inline void write_masked(void* to, uint64_t mask, V value) {
  using E = Elements<T, V>;
  if (mask == E::all) return write(to, value);
  const E v(value);
  for (int i = 0; i < E::n; ++i)
    if (mask >> i & 1) __builtin_memcpy(static_cast<T*>(to) + i, &v.at[i], sizeof(T));
}
template <class T, class V>
inline V blend(uint64_t mask, V unset, V set) {
  Elements<T, V> v(unset);
  const Elements<T, V> other(set);
  for (int i = 0; i < v.n; ++i) v.at[i] = mask >> i & 1 ? other.at[i] : v.at[i];
  return v.vector();
}
// Element order[i] of a, or of a and b as one row.
template <class T, class V>
inline V permute(__m512i order, V a) {
  const Elements<T, __m512i> from(order), all(static_cast<__m512i>(a));
  Elements<T, __m512i> to;
  for (int i = 0; i < to.n; ++i) to.at[i] = all.at[from.at[i] % to.n];
  return static_cast<V>(to.vector());
}
template <class T>
inline __m512i permute_two(__m512i a, __m512i order, __m512i b) {
  const Elements<T, __m512i> from(order), low(a), high(b);
  Elements<T, __m512i> to;
  for (int i = 0; i < to.n; ++i) {
    const int at = from.at[i] % (2 * to.n);
    to.at[i] = at < to.n ? low.at[at] : high.at[at - to.n];
  }
  return to.vector();
}

// The i-th 128 bits.
EMULATED __m128i block(__m512i v, int i) {
  const __m256i half = i & 2 ? v.high : v.low;
  return i & 1 ? upper(half) : lower(half);
}
// The lower 16 bits of every lane.
EMULATED __m128i lower_16bit(__m256i v) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i packed = _mm256_shuffle_epi8(v, order);
  return _mm_unpacklo_epi64(lower(packed), upper(packed));
}
// Eight floats as bf16 in the lower halves of the lanes.
EMULATED __m256i rounded_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), exponent = _mm256_set1_epi32(0x7f800000);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0x80000000)));
  const __m256i nan =
      _mm256_cmpgt_epi32(_mm256_andnot_si256(_mm256_set1_epi32(static_cast<int>(0x80000000)), bits), exponent);
  const __m256i tiny = _mm256_cmpeq_epi32(_mm256_and_si256(bits, exponent), _mm256_setzero_si256());
  const __m256i result = _mm256_blendv_epi8(_mm256_blendv_epi8(rounded, quiet, nan), sign, tiny);
  return _mm256_srli_epi32(result, 16);
}

}  // namespace
}  // namespace wide

// clang-format off

// --- tables: intrinsic, types, what does it

#define SAME_BITS(name, To, From) EMULATED To name(From v) { return static_cast<To>(v); }
SAME_BITS(_mm512_castps_si512, __m512i, __m512)
SAME_BITS(_mm512_castsi512_ps, __m512, __m512i)
SAME_BITS(_mm512_castps_pd, __m512d, __m512)
SAME_BITS(_mm512_castpd_ps, __m512, __m512d)
#undef SAME_BITS

#define ALL_EQUAL(name, V, T, half) EMULATED V name(T v) { return {half(v), half(v)}; }
ALL_EQUAL(_mm512_set1_ps, __m512, float, _mm256_set1_ps)
ALL_EQUAL(_mm512_set1_epi8, __m512i, char, _mm256_set1_epi8)
ALL_EQUAL(_mm512_set1_epi16, __m512i, short, _mm256_set1_epi16)
ALL_EQUAL(_mm512_set1_epi32, __m512i, int, _mm256_set1_epi32)
ALL_EQUAL(_mm512_broadcastd_epi32, __m512i, __m128i, _mm256_broadcastd_epi32)
#undef ALL_EQUAL

#define ZERO(name, V, half) EMULATED V name() { return {half(), half()}; }
ZERO(_mm512_setzero_ps, __m512, _mm256_setzero_ps)
ZERO(_mm512_setzero_si512, __m512i, _mm256_setzero_si256)
#undef ZERO

#define UNARY(name, To, From, half) EMULATED To name(From v) { return {half(v.low), half(v.high)}; }
UNARY(_mm512_cvtepi32_ps, __m512, __m512i, _mm256_cvtepi32_ps)
#undef UNARY

#define SHIFT(name, half) EMULATED __m512i name(__m512i v, int bits) { return {half(v.low, bits), half(v.high, bits)}; }
SHIFT(_mm512_slli_epi16, _mm256_slli_epi16)
SHIFT(_mm512_slli_epi32, _mm256_slli_epi32)
SHIFT(_mm512_slli_epi64, _mm256_slli_epi64)
SHIFT(_mm512_srli_epi16, _mm256_srli_epi16)
SHIFT(_mm512_srli_epi32, _mm256_srli_epi32)
SHIFT(_mm512_srli_epi64, _mm256_srli_epi64)
#undef SHIFT

#define BINARY(name, V, half) EMULATED V name(V a, V b) { return {half(a.low, b.low), half(a.high, b.high)}; }
BINARY(_mm512_add_ps, __m512, _mm256_add_ps)
BINARY(_mm512_sub_ps, __m512, _mm256_sub_ps)
BINARY(_mm512_mul_ps, __m512, _mm256_mul_ps)
BINARY(_mm512_add_epi8, __m512i, _mm256_add_epi8)
BINARY(_mm512_add_epi16, __m512i, _mm256_add_epi16)
BINARY(_mm512_add_epi32, __m512i, _mm256_add_epi32)
BINARY(_mm512_min_epu32, __m512i, _mm256_min_epu32)
BINARY(_mm512_max_epu8, __m512i, _mm256_max_epu8)
BINARY(_mm512_shuffle_epi8, __m512i, _mm256_shuffle_epi8)
BINARY(_mm512_xor_si512, __m512i, _mm256_xor_si256)
BINARY(_mm512_unpacklo_epi8, __m512i, _mm256_unpacklo_epi8)
BINARY(_mm512_unpackhi_epi8, __m512i, _mm256_unpackhi_epi8)
BINARY(_mm512_unpacklo_epi16, __m512i, _mm256_unpacklo_epi16)
BINARY(_mm512_unpackhi_epi16, __m512i, _mm256_unpackhi_epi16)
BINARY(_mm512_max_epu32, __m512i, _mm256_max_epu32)
BINARY(_mm512_and_si512, __m512i, _mm256_and_si256)
BINARY(_mm512_andnot_si512, __m512i, _mm256_andnot_si256)
BINARY(_mm512_or_si512, __m512i, _mm256_or_si256)
BINARY(_mm512_unpacklo_ps, __m512, _mm256_unpacklo_ps)
BINARY(_mm512_unpackhi_ps, __m512, _mm256_unpackhi_ps)
BINARY(_mm512_unpacklo_pd, __m512d, _mm256_unpacklo_pd)
BINARY(_mm512_unpackhi_pd, __m512d, _mm256_unpackhi_pd)
BINARY(_mm512_unpacklo_epi32, __m512i, _mm256_unpacklo_epi32)
BINARY(_mm512_unpackhi_epi32, __m512i, _mm256_unpackhi_epi32)
BINARY(_mm512_unpacklo_epi64, __m512i, _mm256_unpacklo_epi64)
BINARY(_mm512_unpackhi_epi64, __m512i, _mm256_unpackhi_epi64)
#undef BINARY

#define TERNARY(name, V, half) \
  EMULATED V name(V a, V b, V c) { return {half(a.low, b.low, c.low), half(a.high, b.high, c.high)}; }
TERNARY(_mm512_fmadd_ps, __m512, _mm256_fmadd_ps)
#undef TERNARY

#define WIDENING(name, To, From, half) EMULATED To name(From v) { return {half(wide::lower(v)), half(wide::upper(v))}; }
WIDENING(_mm512_cvtepu8_epi16, __m512i, __m256i, _mm256_cvtepu8_epi16)
WIDENING(_mm512_cvtepu8_epi32, __m512i, __m128i, _mm256_cvtepu8_epi32)
WIDENING(_mm512_cvtepi8_epi32, __m512i, __m128i, _mm256_cvtepi8_epi32)
WIDENING(_mm512_cvtepu16_epi32, __m512i, __m256i, _mm256_cvtepu16_epi32)
WIDENING(_mm512_cvtph_ps, __m512, __m256i, _mm256_cvtph_ps)
#undef WIDENING

#define LOAD(name, V) EMULATED V name(const void* from) { return wide::read<V>(from); }
LOAD(_mm512_loadu_ps, __m512)
LOAD(_mm512_loadu_si512, __m512i)
#undef LOAD

#define STORE(name, V) EMULATED void name(void* to, V v) { wide::write(to, v); }
STORE(_mm512_storeu_ps, __m512)
STORE(_mm512_storeu_si512, __m512i)
#undef STORE

#define LOAD_ALIGNED(name, V) EMULATED V name(const void* from) { return wide::check_aligned(from), wide::read<V>(from); }
LOAD_ALIGNED(_mm512_load_ps, __m512)
LOAD_ALIGNED(_mm512_load_si512, __m512i)
#undef LOAD_ALIGNED

#define STORE_ALIGNED(name, V) EMULATED void name(void* to, V v) { wide::check_aligned(to), wide::write(to, v); }
STORE_ALIGNED(_mm512_store_ps, __m512)
STORE_ALIGNED(_mm512_store_si512, __m512i)
#undef STORE_ALIGNED

#define MASKED_LOAD(name, V, Mask, T) EMULATED V name(Mask mask, const void* from) { return wide::read_masked<T, V>(mask, from); }
MASKED_LOAD(_mm_maskz_loadu_epi8, __m128i, __mmask16, int8_t)
MASKED_LOAD(_mm256_maskz_loadu_epi8, __m256i, __mmask32, int8_t)
MASKED_LOAD(_mm512_maskz_loadu_epi8, __m512i, __mmask64, int8_t)
MASKED_LOAD(_mm256_maskz_loadu_epi16, __m256i, __mmask16, int16_t)
MASKED_LOAD(_mm512_maskz_loadu_epi16, __m512i, __mmask32, int16_t)
MASKED_LOAD(_mm512_maskz_loadu_ps, __m512, __mmask16, float)
#undef MASKED_LOAD

#define MASKED_STORE(name, V, Mask, T) EMULATED void name(void* to, Mask mask, V v) { wide::write_masked<T>(to, mask, v); }
MASKED_STORE(_mm256_mask_storeu_epi16, __m256i, __mmask16, int16_t)
MASKED_STORE(_mm512_mask_storeu_epi16, __m512i, __mmask32, int16_t)
MASKED_STORE(_mm512_mask_storeu_ps, __m512, __mmask16, float)
#undef MASKED_STORE

#define BLEND(name, V, Mask, T) EMULATED V name(Mask mask, V unset, V set) { return wide::blend<T>(mask, unset, set); }
BLEND(_mm512_mask_blend_epi8, __m512i, __mmask64, int8_t)
BLEND(_mm512_mask_blend_epi16, __m512i, __mmask32, int16_t)
BLEND(_mm512_mask_blend_epi32, __m512i, __mmask16, int32_t)
BLEND(_mm512_mask_blend_ps, __m512, __mmask16, float)
#undef BLEND

#define MASKED_MOVE(name, V, Mask, T) EMULATED V name(V unset, Mask mask, V set) { return wide::blend<T>(mask, unset, set); }
MASKED_MOVE(_mm512_mask_mov_epi32, __m512i, __mmask16, int32_t)
#undef MASKED_MOVE

#define PERMUTE(name, V, T) EMULATED V name(__m512i order, V v) { return wide::permute<T>(order, v); }
PERMUTE(_mm512_permutexvar_epi16, __m512i, uint16_t)
PERMUTE(_mm512_permutexvar_epi32, __m512i, uint32_t)
PERMUTE(_mm512_permutexvar_ps, __m512, uint32_t)
#undef PERMUTE

#define PERMUTE_TWO(name, T) EMULATED __m512i name(__m512i a, __m512i order, __m512i b) { return wide::permute_two<T>(a, order, b); }
PERMUTE_TWO(_mm512_permutex2var_epi16, uint16_t)
PERMUTE_TWO(_mm512_permutex2var_epi32, uint32_t)
#undef PERMUTE_TWO

// clang-format on

// --- one of a kind

EMULATED __m256 _mm512_castps512_ps256(__m512 v) { return v.low; }
EMULATED __m256i _mm512_castsi512_si256(__m512i v) { return v.low; }
// Nobody may rely on the upper half.
EMULATED __m512i _mm512_castsi256_si512(__m256i v) { return {v, _mm256_set1_epi8(0x5a)}; }
EMULATED __m256 _mm512_extractf32x8_ps(__m512 v, int half) { return half & 1 ? v.high : v.low; }
EMULATED __m512i _mm512_broadcast_i64x4(__m256i v) { return {v, v}; }
EMULATED __m512i _mm512_broadcast_i32x4(__m128i v) {
  const __m256i both = _mm256_broadcastsi128_si256(v);
  return {both, both};
}
EMULATED __m512i _mm512_srlv_epi16(__m512i v, __m512i counts) {
  wide::Elements<uint16_t, __m512i> words(v);
  const wide::Elements<uint16_t, __m512i> by(counts);
  for (int i = 0; i < words.n; ++i) words.at[i] = by.at[i] < 16 ? static_cast<uint16_t>(words.at[i] >> by.at[i]) : 0;
  return words.vector();
}
EMULATED __m512i _mm512_cvtepu8_epi64(__m128i v) {
  return {_mm256_cvtepu8_epi64(v), _mm256_cvtepu8_epi64(_mm_srli_si128(v, 4))};
}
EMULATED __mmask64 _mm512_movepi8_mask(__m512i v) {
  const auto bits = [](__m256i part) {
    return static_cast<__mmask64>(static_cast<uint32_t>(_mm256_movemask_epi8(part)));
  };
  return bits(v.low) | bits(v.high) << 32;
}
EMULATED __mmask32 _mm512_cmpeq_epi16_mask(__m512i a, __m512i b) {
  const auto mask = [](__m256i equal) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(equal, equal), 0x08);
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes)) & 0xffffu;
  };
  return mask(_mm256_cmpeq_epi16(a.low, b.low)) | mask(_mm256_cmpeq_epi16(a.high, b.high)) << 16;
}
EMULATED __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  const int low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.low, b.low)));
  const int high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.high, b.high)));
  return static_cast<__mmask16>(low | high << 8);
}
EMULATED __m512i _mm512_inserti64x4(__m512i v, __m256i part, int half) {
  return half & 1 ? __m512i{v.low, part} : __m512i{part, v.high};
}

// Last element first.
template <class... T>
EMULATED __m512i _mm512_set_epi16(T... elements) {
  static_assert(sizeof...(T) == 32);
  const int16_t reversed[] = {static_cast<int16_t>(elements)...};
  wide::Elements<int16_t, __m512i> v;
  for (int i = 0; i < 32; ++i) v.at[i] = reversed[31 - i];
  return v.vector();
}
EMULATED __m512 _mm512_setr_ps(float a, float b, float c, float d, float e, float f, float g, float h, float i, float j,
                               float k, float l, float m, float n, float o, float p) {
  return {_mm256_setr_ps(a, b, c, d, e, f, g, h), _mm256_setr_ps(i, j, k, l, m, n, o, p)};
}
EMULATED __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l,
                                   int m, int n, int o, int p) {
  return {_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p)};
}

// 128-bit blocks: two of a, two of b.
EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) {
  return {wide::joined(wide::block(a, which), wide::block(a, which >> 2)),
          wide::joined(wide::block(b, which >> 4), wide::block(b, which >> 6))};
}

// In the order of g++: halves, quarters, pairs.
EMULATED float _mm512_reduce_add_ps(__m512 v) {
  const __m256 eight = _mm256_add_ps(v.high, v.low);
  const __m128 four = _mm_add_ps(wide::upper(eight), wide::lower(eight)),
               two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

EMULATED __m256i _mm512_cvtepi32_epi16(__m512i v) {
  return wide::joined(wide::lower_16bit(v.low), wide::lower_16bit(v.high));
}

// Immediates of AVX2 instructions: they have to stay literals.
#define _mm512_cmp_ps_mask(a, b, how)                                                                 \
  [](__m512 p, __m512 q) {                                                                            \
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(p.low, q.low, how));                             \
    return static_cast<__mmask16>(low | _mm256_movemask_ps(_mm256_cmp_ps(p.high, q.high, how)) << 8); \
  }(a, b)
#define _mm512_cvtps_ph(v, how) \
  [](__m512 p) { return wide::joined(_mm256_cvtps_ph(p.low, how), _mm256_cvtps_ph(p.high, how)); }(v)

// --- BF16

#ifdef MOELORA_EMULATE_BF16

EMULATED __m256bh _mm512_cvtneps_pbh(__m512 v) {
  return wide::joined(wide::lower_16bit(wide::rounded_to_bf16(v.low)),
                      wide::lower_16bit(wide::rounded_to_bf16(v.high)));
}
// The first argument becomes the upper half.
EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return {_mm512_cvtneps_pbh(low), _mm512_cvtneps_pbh(high)};
}

EMULATED __m256 _mm256_dpbf16_ps(__m256 sum, __m256bh a, __m256bh b) {
  const __m256i upper_16bit = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  const __m256i a_odd = _mm256_and_si256(a, upper_16bit), b_odd = _mm256_and_si256(b, upper_16bit);
  const __m256i a_even = _mm256_slli_epi32(a, 16), b_even = _mm256_slli_epi32(b, 16);
  // To nearest, subnormals are zero in and out, no exceptions. One piece of assembly: the compiler would move
  // arithmetic across changes of MXCSR.
  const unsigned before = _mm_getcsr(), during = 0x9fc0;
  asm("vldmxcsr %[during]\n\t"
      "vfmadd231ps %[b_odd], %[a_odd], %[sum]\n\t"
      "vfmadd231ps %[b_even], %[a_even], %[sum]\n\t"
      "vldmxcsr %[before]"
      : [sum] "+x"(sum)
      : [a_odd] "x"(a_odd), [b_odd] "x"(b_odd), [a_even] "x"(a_even), [b_even] "x"(b_even), [during] "m"(during),
        [before] "m"(before));
  return sum;
}
EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  return {_mm256_dpbf16_ps(sum.low, a.low, b.low), _mm256_dpbf16_ps(sum.high, a.high, b.high)};
}
#endif

#undef EMULATED
