// fp32 on any CPU; bf16 and fp16 are widened on the way in.
#include "ukernel/f32_kernels.inl"
#include "ukernel/kernel_sets.h"
#include "ukernel/peak.inl"
#include "ukernel/unpack_portable.inl"
#include "ukernel/vec_portable.inl"

const moelora::Kernels& moelora::f32_kernels_portable() {
  static const Kernels kernels = [] {
    Kernels k = f32_kernels<PortableVec<float, 4>, void, 4, 4>("f32_tile_4x8_portable");
    fill_f32_unpack<PortableUnpack>(k);
    k.peak = peak<Plain<PortableVec<float, 4>, moelora::DType::f32>, 2, 6>;
    return k;
  }();
  return kernels;
}
