#include "dispatch/table.h"

#include <stdexcept>

#include "ukernel/kernel_sets.h"

namespace moelora {
namespace {

struct Row {
  Isa isa;
  const Kernels& (*kernels)();
  bool takes[kDTypes];  // bf16, fp16, fp32, fp64
  Blocking blocking;
};

constexpr int64_t kCombine = int64_t{24} << 20;

// Best first for every dtype.
// fp32 sums are cut every 512 steps to keep rounding at the level of short sums; bf16 needs no such cut.
const Row kRows[] = {
// row_chunk dot_rows odd_rows thin_rows thin_depth segment depth outputs combine_bytes token_chunk
// outer_rows outer_cols outer_depth, as in table.h
#ifdef MOELORA_BUILT_amx_bf16
    // Depths are multiples of 32, a tile's. Caches: 2 MB of L2.
    {Isa::amx_bf16,
     bf16_kernels_amx_bf16,
     {true, false, false, false},
     {256, 0, 0, 0, 128, 64, 4096, 2048, kCombine, 4096, 256, 256, 512}},
#endif
#ifdef MOELORA_BUILT_avx512_bf16
    {Isa::avx512_bf16,
     bf16_kernels_avx512_bf16,
     {true, false, false, false},
     {192, 8, 4, 32, 64, 48, 2048, 2048, kCombine, 4096, 192, 256, 512}},
#endif
#ifdef MOELORA_BUILT_avx512
    {Isa::avx512,
     f32_kernels_avx512,
     {true, true, true, false},
     {128, 8, 4, 32, 64, 48, 512, 2048, kCombine, 4096, 96, 256, 512}},
#endif
#ifdef MOELORA_BUILT_avx2
    {Isa::avx2,
     f32_kernels_avx2,
     {true, true, true, false},
     {96, 0, 0, 32, 64, 48, 512, 2048, kCombine, 4096, 96, 256, 512}},
#endif
    {Isa::portable,
     f32_kernels_portable,
     {true, true, true, false},
     {64, 0, 0, 32, 64, 48, 512, 2048, kCombine, 4096, 96, 128, 512}},
    {Isa::portable,
     f64_kernels_portable,
     {false, false, false, true},
     {64, 0, 0, 32, 64, 48, 512, 2048, kCombine, 4096, 96, 128, 512}},
};

bool usable(Isa isa) {
  for (const IsaState& s : isa_states())
    if (s.isa == isa) return s.usable();
  return false;
}

KernelChoice choose(DType dtype) {
  const Isa best = chosen_isa();
  for (const Row& row : kRows)
    if (row.takes[static_cast<int>(dtype)] && row.isa >= best && usable(row.isa))
      return {row.isa, &row.kernels(), row.blocking};
  throw std::logic_error("no kernel set takes this dtype");
}

}  // namespace

const KernelChoice& kernels_for(DType dtype) {
  static const KernelChoice choices[kDTypes] = {choose(DType::bf16), choose(DType::f16), choose(DType::f32),
                                                choose(DType::f64)};
  return choices[static_cast<int>(dtype)];
}

std::vector<KernelChoice> usable_kernels() {
  std::vector<KernelChoice> all;
  for (const Row& row : kRows)
    if (usable(row.isa)) all.push_back({row.isa, &row.kernels(), row.blocking});
  return all;
}

void release_matrix_unit() {
#ifdef MOELORA_BUILT_amx_bf16
  static const auto release = usable(Isa::amx_bf16) ? bf16_kernels_amx_bf16().release : nullptr;
  if (release) release();
#endif
}

}  // namespace moelora
