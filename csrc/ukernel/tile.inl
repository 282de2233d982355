// The tile over a vector policy. Include inside an instruction set's unit only.
//
// Op: elem, acc_t, vec (accumulators), opvec (operands), lanes, pack,
//     broadcast(elem*), broadcast_last(elem*) (one element where pack is 2), load_panel(elem*), fma(opvec, opvec, vec)
#pragma once

#include "ukernel/ukernel.h"

namespace {

// C: [MR, NV · lanes]
template <class Op, int MR, int NV>
void tile(const moelora::TileArgs& args) {
  using elem = typename Op::elem;
  using acc_t = typename Op::acc_t;
  typename Op::vec acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = Op::zero();

  for (int s = 0; s < args.n_segments; ++s) {
    const elem* l[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) l[i] = static_cast<const elem*>(args.segments[s].l[i]);
    const elem* r = static_cast<const elem*>(args.segments[s].r);
    const int64_t line = args.panel_lanes * Op::pack;
    const int64_t steps = args.segments[s].depth / Op::pack;
    for (int64_t p = 0; p < steps; ++p, r += line) {
      typename Op::opvec b[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) b[v] = Op::load_panel(r + v * Op::lanes * Op::pack);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const typename Op::opvec a = Op::broadcast(l[i] + p * Op::pack);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = Op::fma(a, b[v], acc[i][v]);
      }
    }
    if (args.segments[s].depth % Op::pack != 0) {
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const typename Op::opvec a = Op::broadcast_last(l[i] + steps * Op::pack);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          acc[i][v] = Op::fma(a, Op::load_panel(r + v * Op::lanes * Op::pack), acc[i][v]);
      }
    }
  }

  acc_t* c = static_cast<acc_t*>(args.c);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      acc_t* at = c + i * args.ldc + v * Op::lanes;
      Op::store(at, args.accumulate ? Op::add(acc[i][v], Op::load(at)) : acc[i][v]);
    }
}

template <class Op, int MR, int MaxVecs>
void fill_tile_row(moelora::Kernels& k) {
  k.tile[MR - 1][0] = tile<Op, MR, 1>;
  if constexpr (MaxVecs > 1) k.tile[MR - 1][1] = tile<Op, MR, 2>;
  if constexpr (MaxVecs > 2) k.tile[MR - 1][2] = tile<Op, MR, 3>;
  if constexpr (MaxVecs > 3) k.tile[MR - 1][3] = tile<Op, MR, 4>;
}

template <class Op, int MaxRows, int MaxVecs>
void fill_tiles(moelora::Kernels& k) {
  k.compute = Op::compute;
  k.pack = Op::pack;
  k.lanes = Op::lanes;
  k.rows = MaxRows;
  k.vecs = MaxVecs;
  fill_tile_row<Op, 1, MaxVecs>(k);
  if constexpr (MaxRows > 1) fill_tile_row<Op, 2, MaxVecs>(k);
  if constexpr (MaxRows > 2) fill_tile_row<Op, 3, MaxVecs>(k);
  if constexpr (MaxRows > 3) fill_tile_row<Op, 4, MaxVecs>(k);
  if constexpr (MaxRows > 4) fill_tile_row<Op, 5, MaxVecs>(k);
  if constexpr (MaxRows > 5) fill_tile_row<Op, 6, MaxVecs>(k);
}

}  // namespace
