// The kernel sets that the build may contain. Which ones it does: MOELORA_BUILT_* from CMake, read in dispatch/.
#pragma once

#include "ukernel/ukernel.h"

namespace moelora {

const Kernels& f32_kernels_portable();
const Kernels& f64_kernels_portable();
const Kernels& f32_kernels_avx2();
const Kernels& f32_kernels_avx512();
const Kernels& bf16_kernels_avx512_bf16();
const Kernels& bf16_kernels_amx_bf16();  // needs the former

}  // namespace moelora
