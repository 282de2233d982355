// The tile over a vector policy. Include inside an instruction set's unit only.
//
// Op: elem, acc_t, vec (accumulators), opvec (operands), lanes, pack,
//     broadcast(elem*), broadcast_last(elem*) (one element where pack is 2), load_panel(elem*), fma(opvec, opvec, vec),
//     stage(elem* dst, const elem* src, n): copies n <= kStage elements, zeros up to kStage
#pragma once

#include "ukernel/ukernel.h"

namespace {

template <class Op, int MR, int NV>
struct Accumulators {
  typename Op::vec at[MR][NV];

  Accumulators() {
#pragma GCC unroll 24
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) at[i][v] = Op::zero();
  }

  void store(const moelora::TileArgs& args) const {
    using acc_t = typename Op::acc_t;
    acc_t* c = static_cast<acc_t*>(args.c);
#pragma GCC unroll 24
    for (int i = 0; i < MR; ++i) {
      if (i >= args.rows) return;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        acc_t* to = c + i * args.ldc + v * Op::lanes;
        Op::store(to, args.accumulate ? Op::add(at[i][v], Op::load(to)) : at[i][v]);
      }
    }
  }
};

// C: [MR, NV · lanes], L in place: one pointer a row.
template <class Op, int MR, int NV>
void tile_in_place(const moelora::TileArgs& args) {
  using elem = typename Op::elem;
  Accumulators<Op, MR, NV> acc;
  for (int s = 0; s < args.n_segments; ++s) {
    const moelora::Segment& segment = args.segments[s];
    const elem* l[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
      l[i] = reinterpret_cast<const elem*>(static_cast<const char*>(segment.l) + i * segment.l_stride);
    const elem* r = static_cast<const elem*>(segment.r);
    const int64_t line = args.panel_lanes * Op::pack;
    const int64_t steps = segment.depth / Op::pack;
    for (int64_t p = 0; p < steps; ++p, r += line) {
      typename Op::opvec b[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) b[v] = Op::load_panel(r + v * Op::lanes * Op::pack);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const typename Op::opvec a = Op::broadcast(l[i] + p * Op::pack);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc.at[i][v] = Op::fma(a, b[v], acc.at[i][v]);
      }
    }
    if (segment.depth % Op::pack != 0) {
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const typename Op::opvec a = Op::broadcast_last(l[i] + steps * Op::pack);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          acc.at[i][v] = Op::fma(a, Op::load_panel(r + v * Op::lanes * Op::pack), acc.at[i][v]);
      }
    }
  }
  acc.store(args);
}

constexpr int kStageBytes = 64;

// C: [MR, NV · lanes], MR a multiple of 4. Tall tiles read L through a small buffer, a cache line of every row at a
// time: rows a power of two apart would evict each other from L1, and one pointer a row is more than there are registers.
template <class Op, int MR, int NV>
void tile_staged(const moelora::TileArgs& args) {
  using elem = typename Op::elem;
  constexpr int kStage = kStageBytes / sizeof(elem);
  alignas(64) elem staged[2][MR][kStage];
  Accumulators<Op, MR, NV> acc;
  for (int s = 0; s < args.n_segments; ++s) {
    const moelora::Segment& segment = args.segments[s];
    const elem* r = static_cast<const elem*>(segment.r);
    const int64_t line = args.panel_lanes * Op::pack;
    const auto stage = [&](int64_t p) {
      const int64_t left = segment.depth - p;
      const char* row = static_cast<const char*>(segment.l) + p * static_cast<int64_t>(sizeof(elem));
      for (int i = 0; i < MR; ++i) {
        Op::stage(staged[p / kStage % 2][i], reinterpret_cast<const elem*>(row), left < kStage ? left : kStage);
        if (i + 1 < args.rows) row += segment.l_stride;
      }
    };
    stage(0);
    for (int64_t p = 0; p < segment.depth; p += kStage) {
      // The next line is copied before this one is used: its stores are done by the time it is read.
      if (p + kStage < segment.depth) stage(p + kStage);
      const elem* l = staged[p / kStage % 2][0];
      const int64_t left = segment.depth - p;
      const int steps = static_cast<int>(((left < kStage ? left : kStage) + Op::pack - 1) / Op::pack);
      for (int q = 0; q < steps; ++q, r += line) {
        typename Op::opvec b[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) b[v] = Op::load_panel(r + v * Op::lanes * Op::pack);
#pragma GCC unroll 24
        for (int i = 0; i < MR; ++i) {
          const typename Op::opvec a = Op::broadcast(l + i * kStage + q * Op::pack);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc.at[i][v] = Op::fma(a, b[v], acc.at[i][v]);
        }
      }
    }
  }
  acc.store(args);
}

constexpr int kInPlaceRows = 8;

// The smallest tile with at least args.rows rows, out of MR, MR - 1 (MR - 4 for staged ones), …
template <class Op, int MR, int NV>
void tile_rows(const moelora::TileArgs& args) {
  if constexpr (MR > kInPlaceRows) {
    if (MR - 4 >= args.rows) return tile_rows<Op, MR - 4, NV>(args);
    tile_staged<Op, MR, NV>(args);
  } else {
    if constexpr (MR > 1)
      if (MR - 1 >= args.rows) return tile_rows<Op, MR - 1, NV>(args);
    tile_in_place<Op, MR, NV>(args);
  }
}

// R1, R2, …: the tallest tile of 1, 2, … vectors; 0 where tiles are narrower.
template <class Op, int R1, int R2, int R3 = 0, int R4 = 0>
void tile_any(const moelora::TileArgs& args) {
  if (args.vecs == 1) return tile_rows<Op, R1, 1>(args);
  if (R3 == 0 || args.vecs == 2) return tile_rows<Op, R2, 2>(args);
  if constexpr (R3 > 0) {
    if (args.vecs == 3) return tile_rows<Op, R3, 3>(args);
    tile_rows<Op, R4, 4>(args);
  }
}

template <class Op, int R1, int R2, int R3 = 0, int R4 = 0>
void fill_tiles(moelora::Kernels& k) {
  k.compute = Op::compute;
  k.pack = Op::pack;
  k.lanes = Op::lanes;
  k.vecs = R3 > 0 ? 4 : 2;
  const int rows[moelora::kMaxTileVecs] = {R1, R2, R3, R4};
  for (int v = 0; v < moelora::kMaxTileVecs; ++v) k.max_rows[v] = rows[v];
  k.tile = tile_any<Op, R1, R2, R3, R4>;
}

}  // namespace
