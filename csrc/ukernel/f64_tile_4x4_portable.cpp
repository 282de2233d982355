// fp64 on any CPU: exact enough for gradcheck on the real operators.
#include "ukernel/f32_kernels.inl"
#include "ukernel/kernel_sets.h"
#include "ukernel/peak.inl"
#include "ukernel/vec_portable.inl"

const moelora::Kernels& moelora::f64_kernels_portable() {
  static const Kernels kernels = [] {
    using V = PortableVec<double, 2>;
    using Op = Plain<V, DType::f64>;
    Kernels k{};
    k.name = "f64_tile_4x4_portable";
    fill_tiles<Op, 4, 4>(k);
    fill_rows<V>(k);
    k.peak = peak<Op, 2, 6>;
    fill_storage<V, Op, double>(k, DType::f64);
    k.flat_lines = k.flat_tile[static_cast<int>(DType::f64)];
    return k;
  }();
  return kernels;
}
