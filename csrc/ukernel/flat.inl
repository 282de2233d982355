// The flat tile over a vector policy, for few rows. Include inside an instruction set's unit only.
//
// Op: as for tile.inl, and load_whole(T*), load_run(T*, n): a vector of a row of storage type T;
//     sums: accumulators that fit the registers beside operands
#pragma once

#include "ukernel/tile.inl"
#include "ukernel/ukernel.h"

namespace {

// C: [MR][width], vectors of R's rows in place, or of lines of Pack p each.
template <class Op, class T, int Pack, int MR>
void flat_tile(const moelora::FlatArgs& args) {
  constexpr int kFlatVecs = 2 * MR <= Op::sums ? 2 : 1;
  using acc_t = typename Op::acc_t;
  const auto l = [&](int i, int64_t p) {
    return reinterpret_cast<const typename Op::elem*>(static_cast<const char*>(args.l) + i * args.l_stride) + p;
  };
  const auto block = [&]<int NV>(int64_t j, const auto& load, const auto& load_c,
                                 const auto& store_c) __attribute__((always_inline)) {
    typename Op::vec acc[MR][NV];
    acc_t* c = static_cast<acc_t*>(args.c) + j;
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        acc[i][v] = args.start == moelora::Start::resume ? load_c(c + i * args.ldc + v * Op::lanes) : Op::zero();
    const T* row = reinterpret_cast<const T*>(static_cast<const char*>(args.r)) + j * Pack;
    const auto step = [&](int64_t p, const auto& broadcast) __attribute__((always_inline)) {
      typename Op::opvec line[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) line[v] = load(row + v * Op::lanes * Pack);
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i) {
        const typename Op::opvec a = broadcast(l(i, p));
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[i][v] = Op::fma(a, line[v], acc[i][v]);
      }
      // The rows that come next, side by side.
      __builtin_prefetch(reinterpret_cast<const char*>(row) + args.ahead, 0, 2);
      row = reinterpret_cast<const T*>(reinterpret_cast<const char*>(row) + args.r_stride);
    };
    int64_t p = 0;
    for (; p + Pack <= args.depth; p += Pack) step(p, [](const auto* at) { return Op::broadcast(at); });
    if constexpr (Pack > 1)
      if (p < args.depth) step(p, [](const auto* at) { return Op::broadcast_last(at); });
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) store_c(c + i * args.ldc + v * Op::lanes, acc[i][v]);
  };
  const auto load_c = [](const acc_t* from) { return Op::load(from); };
  const auto store_c = [](acc_t* to, typename Op::vec v) { Op::store(to, v); };
  int64_t j = 0;
  for (; j + kFlatVecs * Op::lanes <= args.width; j += kFlatVecs * Op::lanes)
    block.template operator()<kFlatVecs>(j, [](const T* at) { return Op::load_whole(at); }, load_c, store_c);
  for (; j < args.width; j += Op::lanes) {
    const int64_t left = args.width - j, n = left < Op::lanes ? left : Op::lanes;
    block.template operator()<1>(
        j, [n](const T* at) { return Op::load_run(at, n * Pack); },
        [n](const acc_t* from) { return Op::load_n(from, n); },
        [n](acc_t* to, typename Op::vec v) { Op::store_n(to, v, n); });
  }
}

template <class Op, class T, int Pack, int MR = moelora::kMaxFlatRows>
void flat_any(const moelora::FlatArgs& args) {
  if constexpr (MR > 1)
    if (args.rows < MR) return flat_any<Op, T, Pack, MR - 1>(args);
  flat_tile<Op, T, Pack, MR>(args);
}

}  // namespace
