#include "dispatch/table.h"

#include <algorithm>
#include <array>
#include <iterator>
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
constexpr int64_t kFlat = int64_t{128} << 10;

constexpr Blocking kPortable = {
    .row_chunk = 64,
    .dot_rows = 0,
    .odd_rows = 0,
    .dot_depth = 2048,
    .few_rows = 32,
    .flat_rows = 4,
    .flat_bytes = kFlat,
    .thin_rows = 32,
    .thin_depth = 64,
    .thin_strip = 512,
    .strip = 16,
    .pass_outputs = 0,
    .packed_strips = 6,
    .byte_strips = 6,
    .packed_depth = 128,
    .packed_flat_rows = 4,
    .segment = 48,
    .depth = 512,
    .chain = 512,
    .outputs = 2048,
    .combine_bytes = kCombine,
    .token_chunk = 4096,
    .outer_rows = 96,
    .outer_cols = 128,
    .outer_depth = 512,
};

// Best first for every dtype.
// Long chains of fp32 additions are cut to keep rounding at the level of short sums; bf16 needs no such cut.
constexpr Row kRows[] = {
#ifdef MOELORA_BUILT_amx_bf16
    // Depths are multiples of 32, a tile's. Caches: 2 MB of L2.
    {
        .isa = Isa::amx_bf16,
        .kernels = bf16_kernels_amx_bf16,
        .takes = {true, false, false, false},
        .blocking =
            {
                .row_chunk = 256,
                .dot_rows = 0,
                .odd_rows = 0,
                .dot_depth = 4096,
                .few_rows = 0,
                .flat_rows = 0,
                .flat_bytes = kFlat,
                .thin_rows = 0,
                .thin_depth = 128,
                .thin_strip = 2048,
                .strip = 256,
                .pass_outputs = 0,
                .packed_strips = 1,
                .byte_strips = 1,
                .packed_depth = 1024,
                .packed_flat_rows = 0,
                .segment = 64,
                .depth = 1024,
                .chain = Blocking::endless,
                .outputs = 2048,
                .combine_bytes = kCombine,
                .token_chunk = 4096,
                .outer_rows = 256,
                .outer_cols = 256,
                .outer_depth = 512,
            },
    },
#endif
#ifdef MOELORA_BUILT_avx512_bf16
    {
        .isa = Isa::avx512_bf16,
        .kernels = bf16_kernels_avx512_bf16,
        .takes = {true, false, false, false},
        .blocking =
            {
                .row_chunk = 192,
                .dot_rows = 12,
                .odd_rows = 4,
                .dot_depth = 4096,
                .few_rows = 32,
                .flat_rows = 12,
                .flat_bytes = kFlat,
                .thin_rows = 32,
                .thin_depth = 128,
                .thin_strip = 2048,
                .strip = 64,
                .pass_outputs = 0,
                .packed_strips = 8,
                .byte_strips = 4,
                .packed_depth = 256,
                .packed_flat_rows = 12,
                .segment = 48,
                .depth = 2048,
                .chain = Blocking::endless,
                .outputs = 2048,
                .combine_bytes = kCombine,
                .token_chunk = 4096,
                .outer_rows = 192,
                .outer_cols = 256,
                .outer_depth = 512,
            },
    },
#endif
#ifdef MOELORA_BUILT_avx512
    {
        .isa = Isa::avx512,
        .kernels = f32_kernels_avx512,
        .takes = {true, true, true, false},
        .blocking =
            {
                .row_chunk = 192,
                .dot_rows = 12,
                .odd_rows = 4,
                .dot_depth = 2048,
                .few_rows = 32,
                .flat_rows = 16,
                .flat_bytes = kFlat,
                .thin_rows = 0,
                .thin_depth = 64,
                .thin_strip = 512,
                .strip = 256,
                .pass_outputs = 768,
                .packed_strips = 1,
                .byte_strips = 1,
                .packed_depth = 256,
                .packed_flat_rows = 16,
                .segment = 48,
                .depth = 256,
                .chain = 256,
                .outputs = 2048,
                .combine_bytes = kCombine,
                .token_chunk = 4096,
                .outer_rows = 96,
                .outer_cols = 256,
                .outer_depth = 512,
            },
    },
#endif
#ifdef MOELORA_BUILT_avx2
    // Two segments or strips of a pass fit 512 KB of L2 beside rows and sums; of few rows, wider strips do.
    {
        .isa = Isa::avx2,
        .kernels = f32_kernels_avx2,
        .takes = {true, true, true, false},
        .blocking =
            {
                .row_chunk = 192,
                .dot_rows = 12,
                .odd_rows = 2,
                .dot_depth = 2048,
                .few_rows = 32,
                .flat_rows = 8,
                .flat_bytes = kFlat,
                .thin_rows = 48,
                .thin_depth = 256,
                .thin_strip = 192,
                .strip = 96,
                .pass_outputs = 768,
                .packed_strips = 2,
                .byte_strips = 2,
                .packed_depth = 256,
                .packed_flat_rows = 16,
                .segment = 96,
                .depth = 256,
                .chain = 256,
                .outputs = 2048,
                .combine_bytes = kCombine,
                .token_chunk = 4096,
                .outer_rows = 96,
                .outer_cols = 240,
                .outer_depth = 512,
            },
    },
#endif
    {
        .isa = Isa::portable,
        .kernels = f32_kernels_portable,
        .takes = {true, true, true, false},
        .blocking = kPortable,
    },
    {
        .isa = Isa::portable,
        .kernels = f64_kernels_portable,
        .takes = {false, false, false, true},
        .blocking = kPortable,
    },
};

static_assert(std::all_of(std::begin(kRows), std::end(kRows),
                          [](const Row& r) { return r.blocking.chain_is_a_pass(); }));

bool usable(Isa isa) {
  for (const IsaState& s : isa_states())
    if (s.isa == isa) return s.usable();
  return false;
}

KernelChoice choice(const Row& row) {
  KernelChoice all{row.isa, &row.kernels(), row.blocking};
  all.blocking.rows_to_l1 = reads_fastest_to_l1();
  return all;
}

KernelChoice choose(DType dtype) {
  const Isa best = chosen_isa();
  for (const Row& row : kRows)
    if (row.takes[static_cast<int>(dtype)] && row.isa >= best && usable(row.isa)) return choice(row);
  throw std::logic_error("no kernel set takes this dtype");
}

}  // namespace

const KernelChoice& kernels_for(DType dtype, bool batch_invariant) {
  static const auto all = [] {
    std::array<std::array<KernelChoice, kDTypes>, 2> choices;
    for (int t = 0; t < kDTypes; ++t) {
      choices[0][t] = choices[1][t] = choose(static_cast<DType>(t));
      // Dot products add up in another order than tiles.
      choices[1][t].blocking.dot_rows = choices[1][t].blocking.odd_rows = 0;
    }
    return choices;
  }();
  return all[batch_invariant][static_cast<int>(dtype)];
}

std::vector<KernelChoice> usable_kernels() {
  std::vector<KernelChoice> all;
  for (const Row& row : kRows)
    if (usable(row.isa)) all.push_back(choice(row));
  return all;
}

void release_matrix_unit() {
#ifdef MOELORA_BUILT_amx_bf16
  static const auto release = usable(Isa::amx_bf16) ? bf16_kernels_amx_bf16().release : nullptr;
  if (release) release();
#endif
}

}  // namespace moelora
