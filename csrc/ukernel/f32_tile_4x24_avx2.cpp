// fp32 FMA on AVX2; bf16 and fp16 are widened on the way in.
#include <immintrin.h>

#include "ukernel/dot_codes_avx2.inl"
#include "ukernel/f32_kernels.inl"
#include "ukernel/flat_codes_avx2.inl"
#include "ukernel/kernel_sets.h"
#include "ukernel/peak.inl"
#include "ukernel/unpack_avx2.inl"
#include "ukernel/vec_avx2.inl"

const moelora::Kernels& moelora::f32_kernels_avx2() {
  static const Kernels kernels = [] {
    Kernels k = f32_kernels<F32x8, void, 12, 6, 4>("f32_tile_4x24_avx2");
    fill_f32_unpack<Avx2Unpack>(k);
    fill_dot_codes<Plain<F32x8, moelora::DType::f32>>(k);
    fill_flat_codes<Plain<F32x8, moelora::DType::f32>>(k);
    k.peak = peak<Plain<F32x8, moelora::DType::f32>, 2, 6>;
    return k;
  }();
  return kernels;
}
