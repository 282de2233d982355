// bf16 dot products: vdpbf16ps, two p a step, fp32 accumulators.
#include <immintrin.h>

#include "ukernel/f32_kernels.inl"
#include "ukernel/kernel_sets.h"
#include "ukernel/vec_avx512.inl"

namespace {

struct Bf16Dot : F32x16 {
  using elem = bf16_t;
  using opvec = __m512bh;
  using unit = __m512i;
  static constexpr int pack = 2;
  static constexpr moelora::DType compute = moelora::DType::bf16;

  static opvec broadcast(const elem* p) { return (__m512bh)_mm512_set1_epi32(moelora::bit_cast<int>(pair(p))); }
  static opvec broadcast_last(const elem* p) { return (__m512bh)_mm512_set1_epi32(p->bits); }
  static opvec load_panel(const elem* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static void stage(elem* dst, const elem* src, int64_t n) { _mm512_store_si512(dst, load_units(src, n)); }
  static vec fma(opvec a, opvec b, vec c) { return _mm512_dpbf16_ps(c, a, b); }

  struct Pair {
    bf16_t low, high;
  };
  static Pair pair(const elem* p) {
    Pair v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }

  static unit load_units(const bf16_t* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1u;
    return _mm512_maskz_loadu_epi16(mask, p);
  }
  static unit load_units(const float* p, int64_t n) {
    const vec high = n > 16 ? load_n(p + 16, n - 16) : zero();
    return (__m512i)_mm512_cvtne2ps_pbh(high, load_n(p, n));
  }
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
};

}  // namespace

const moelora::Kernels& moelora::bf16_kernels_avx512_bf16() {
  static const Kernels kernels = [] {
    Kernels k{};
    k.name = "bf16_tile_6x64_avx512_bf16";
    fill_tiles<Bf16Dot, 24, 12, 8, 6>(k);
    fill_rows<F32x16>(k);
    fill_storage<F32x16, Bf16Dot, bf16_t>(k, DType::bf16);
    fill_storage<F32x16, Bf16Dot, float>(k, DType::f32);
    return k;
  }();
  return kernels;
}
