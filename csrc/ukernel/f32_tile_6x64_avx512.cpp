// fp32 FMA on AVX-512; bf16 and fp16 are widened on the way in.
#include <immintrin.h>

#include "ukernel/f32_kernels.inl"
#include "ukernel/kernel_sets.h"
#include "ukernel/peak.inl"
#include "ukernel/unpack_avx512.inl"
#include "ukernel/vec_avx2.inl"
#include "ukernel/vec_avx512.inl"

const moelora::Kernels& moelora::f32_kernels_avx512() {
  static const Kernels kernels = [] {
    Kernels k = f32_kernels<F32x16, F32x8, 24, 12, 8, 6>("f32_tile_6x64_avx512");
    fill_f32_unpack<Avx512Unpack>(k);
    k.peak = peak<Plain<F32x16, moelora::DType::f32>, 8, 2>;
    return k;
  }();
  return kernels;
}
