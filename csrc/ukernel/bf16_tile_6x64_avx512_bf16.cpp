// bf16 dot products: vdpbf16ps, two p a step, fp32 accumulators.
#include <immintrin.h>

#include "ukernel/dot_codes_avx512_bf16.inl"
#include "ukernel/f32_kernels.inl"
#include "ukernel/flat_codes_avx512_bf16.inl"
#include "ukernel/kernel_sets.h"
#include "ukernel/peak.inl"
#include "ukernel/unpack_avx512_bf16.inl"
#include "ukernel/vec_avx2.inl"
#include "ukernel/vec_avx512.inl"

namespace {

struct Bf16Pair {
  bf16_t low, high;
};
inline int pair_bits(const bf16_t* p) {
  Bf16Pair v;
  __builtin_memcpy(&v, p, sizeof(v));
  return moelora::bit_cast<int>(v);
}

struct Bf16DotHalf : F32x8 {
  using opvec = __m256bh;
  static opvec broadcast(const bf16_t* p) { return (__m256bh)_mm256_broadcastd_epi32(_mm_cvtsi32_si128(pair_bits(p))); }
  static opvec broadcast_last(const bf16_t* p) { return (__m256bh)_mm256_broadcastd_epi32(_mm_cvtsi32_si128(p->bits)); }
  static opvec load_panel(const bf16_t* p) { return (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static vec fma(opvec a, opvec b, vec c) { return _mm256_dpbf16_ps(c, a, b); }
};

struct Bf16Dot : F32x16 {
  using Half = Bf16DotHalf;
  static constexpr bool has_half = true;
  static constexpr bool weaves = true;
  static constexpr bool widens = false;
  using elem = bf16_t;
  using opvec = __m512bh;
  using unit = __m512i;
  static constexpr int pack = 2;
  static constexpr moelora::DType compute = moelora::DType::bf16;

  static opvec broadcast(const elem* p) { return (__m512bh)_mm512_broadcastd_epi32(_mm_cvtsi32_si128(pair_bits(p))); }
  static opvec broadcast_last(const elem* p) { return (__m512bh)_mm512_broadcastd_epi32(_mm_cvtsi32_si128(p->bits)); }
  static opvec load_panel(const elem* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static opvec load_whole(const elem* p) { return load_panel(p); }
  static opvec load_run(const elem* p, int64_t n) { return n >= 32 ? load_panel(p) : (__m512bh)load_units(p, n); }
  static void stage(elem* dst, const elem* src, int64_t n) { _mm512_store_si512(dst, load_units(src, n)); }
  static vec fma(opvec a, opvec b, vec c) { return _mm512_dpbf16_ps(c, a, b); }

  static __m256bh low_half(opvec v) { return (__m256bh)_mm512_castsi512_si256((__m512i)v); }

  static unit load_units(const bf16_t* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1u;
    return _mm512_maskz_loadu_epi16(mask, p);
  }
  static unit load_units(const float* p, int64_t n) {
    const vec high = n > 16 ? load_n(p + 16, n - 16) : zero();
    return (__m512i)_mm512_cvtne2ps_pbh(high, load_n(p, n));
  }
  // Lanes 0-15 and 16-31 of (a[j], b[j]).
  static void interleave_two(const bf16_t* a, const bf16_t* b, unit* low, unit* high) {
    const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    *low = _mm512_permutex2var_epi16(first, order, second);
    *high = _mm512_permutex2var_epi16(first, _mm512_add_epi16(order, _mm512_set1_epi16(16)), second);
  }
  static void weave(const bf16_t* a, const bf16_t* b, opvec (&line)[4]) {
    unit units[4];
    interleave_two(a, b, &units[0], &units[1]);
    interleave_two(a + 32, b + 32, &units[2], &units[3]);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) line[v] = (opvec)units[v];
  }
  static void store_operand(elem* p, opvec v) { _mm512_storeu_si512(p, (__m512i)v); }
  static unit interleave(const bf16_t* a, const bf16_t* b, int64_t n) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first16(n), a));
    if (b == nullptr) return low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first16(n), b));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static unit interleave(const float* a, const float* b, int64_t n) {
    const __m512i low = _mm512_cvtepu16_epi32(to_bf16x16(load_n(a, n)));
    if (b == nullptr) return low;
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16x16(load_n(b, n))), 16));
  }
  static unit zero_units() { return _mm512_setzero_si512(); }
  static void transpose(unit (&v)[16]) { transpose_16x16(v); }
  static void store_units(elem* p, unit v) { _mm512_storeu_si512(p, v); }
  static void store_half(elem* p, unit v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(v));
  }
};

}  // namespace

const moelora::Kernels& moelora::bf16_kernels_avx512_bf16() {
  static const Kernels kernels = [] {
    Kernels k{};
    k.name = "bf16_tile_6x64_avx512_bf16";
    fill_tiles<Bf16Dot, 24, 12, 8, 6>(k);
    fill_rows<F32x16>(k);
    fill_scales<Bf16Unpack>(k);
    fill_unpack<Bf16Unpack, bf16_t>(k, DType::bf16);
    Bf16Lines::fill(k);
    k.flat_lines = flat_any<Bf16Dot, Rows<Bf16Dot, bf16_t, 2>>;
    fill_flat_codes<Bf16Dot>(k);
    fill_dot_codes<Bf16Dot>(k);
    k.peak = peak<Bf16Dot, 8, 2>;
    fill_storage<F32x16, Bf16Dot, bf16_t>(k, DType::bf16);
    fill_storage<F32x16, Bf16Dot, float>(k, DType::f32);
    return k;
  }();
  return kernels;
}
