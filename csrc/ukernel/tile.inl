// The tile over a vector policy. Include inside an instruction set's unit only.
//
// Op: elem, acc_t, vec (accumulators), opvec (operands), lanes, pack,
//     broadcast(elem*), broadcast_last(elem*) (one element where pack is 2), load_panel(elem*), fma(opvec, opvec, vec),
//     stage(elem* dst, const elem* src, n): copies n <= kStage elements, zeros up to kStage
// Half: the same with half as many lanes; Op itself where there is none.
#pragma once

#include "ukernel/ukernel.h"

namespace {

// One tile's accumulators: NV vectors a row, the last of them half as wide if HasHalf.
template <class Op, int MR, int NV, bool HasHalf>
struct Accumulators {
  using Half = typename Op::Half;
  using elem = typename Op::elem;
  static constexpr int kFull = HasHalf ? NV - 1 : NV, kHalf = HasHalf ? 1 : 0;
  // Arrays of zero length are not allowed; one unused element is never touched.
  typename Op::vec full[MR][kFull > 0 ? kFull : 1];
  typename Half::vec half[MR];

  Accumulators() {
#pragma GCC unroll 24
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kFull; ++v) full[i][v] = Op::zero();
      if constexpr (HasHalf) half[i] = Half::zero();
    }
  }

  // Adds L's p-th pack (row i at l(i)) times line r of the panel.
  template <bool Last, class LeftAt>
  [[gnu::always_inline]] void step(const LeftAt& l, const elem* r) {
    typename Op::opvec b[kFull > 0 ? kFull : 1];
    typename Half::opvec b_half;
#pragma GCC unroll 4
    for (int v = 0; v < kFull; ++v) b[v] = Op::load_panel(r + v * Op::lanes * Op::pack);
    if constexpr (HasHalf) b_half = Half::load_panel(r + kFull * Op::lanes * Op::pack);
#pragma GCC unroll 24
    for (int i = 0; i < MR; ++i) {
      if constexpr (kFull > 0) {
        const typename Op::opvec a = Last ? Op::broadcast_last(l(i)) : Op::broadcast(l(i));
#pragma GCC unroll 4
        for (int v = 0; v < kFull; ++v) full[i][v] = Op::fma(a, b[v], full[i][v]);
        if constexpr (HasHalf) half[i] = Half::fma(Op::low_half(a), b_half, half[i]);
      } else {
        half[i] = Half::fma(Last ? Half::broadcast_last(l(i)) : Half::broadcast(l(i)), b_half, half[i]);
      }
    }
  }

  void store(const moelora::TileArgs& args) const {
    using acc_t = typename Op::acc_t;
    acc_t* c = static_cast<acc_t*>(args.c);
#pragma GCC unroll 24
    for (int i = 0; i < MR; ++i) {
      if (i >= args.rows) return;
      acc_t* to = c + i * args.ldc;
#pragma GCC unroll 4
      for (int v = 0; v < kFull; ++v, to += Op::lanes)
        Op::store(to, args.accumulate ? Op::add(full[i][v], Op::load(to)) : full[i][v]);
      if constexpr (HasHalf) Half::store(to, args.accumulate ? Half::add(half[i], Half::load(to)) : half[i]);
    }
  }
};

// Walks the lines of an Ahead, a few a step.
struct Fetcher {
  const char* at;
  const char* row_end;
  int64_t left, skip, stride;
  int per_step;

  Fetcher(const moelora::Ahead& ahead, int64_t steps) {
    const int64_t lines = (ahead.bytes + 63) / 64;
    at = static_cast<const char*>(ahead.from);
    row_end = at + lines * 64;
    left = lines * ahead.rows;
    stride = ahead.stride;
    skip = stride - lines * 64;
    per_step = steps > 0 ? static_cast<int>((left + steps - 1) / steps) : 0;
  }

  [[gnu::always_inline]] void step() {
    for (int i = 0; i < per_step; ++i) {
      if (left == 0) return;
      __builtin_prefetch(at, 0, 2);
      at += 64;
      --left;
      if (at == row_end) {
        at += skip;
        row_end += stride;
      }
    }
  }
};

// C: [MR, NV · lanes], L in place: one pointer a row.
template <class Op, int MR, int NV, bool HasHalf>
void tile_in_place(const moelora::TileArgs& args) {
  using elem = typename Op::elem;
  Accumulators<Op, MR, NV, HasHalf> acc;
  Fetcher ahead(args.ahead, args.segments[0].depth / Op::pack);
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
      acc.template step<false>([&](int i) { return l[i] + p * Op::pack; }, r);
      ahead.step();
    }
    if (segment.depth % Op::pack != 0) acc.template step<true>([&](int i) { return l[i] + steps * Op::pack; }, r);
  }
  acc.store(args);
}

constexpr int kStageBytes = 64;

// C: [MR, NV · lanes], MR a multiple of 4. Tall tiles read L through a small buffer, a cache line of every row at a
// time: rows a power of two apart would evict each other from L1, and one pointer a row is more than there are
// registers.
template <class Op, int MR, int NV, bool HasHalf>
void tile_staged(const moelora::TileArgs& args) {
  using elem = typename Op::elem;
  constexpr int kStage = kStageBytes / sizeof(elem);
  alignas(64) elem staged[2][MR][kStage];
  Accumulators<Op, MR, NV, HasHalf> acc;
  Fetcher ahead(args.ahead, args.segments[0].depth / Op::pack);
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
        acc.template step<false>([&](int i) { return l + i * kStage + q * Op::pack; }, r);
        ahead.step();
      }
    }
  }
  acc.store(args);
}

constexpr int kInPlaceRows = 8;

// The smallest tile with at least args.rows rows, out of MR, MR - 1 (MR - 4 for staged ones), …
template <class Op, int MR, int NV, bool HasHalf>
void tile_rows(const moelora::TileArgs& args) {
  if constexpr (MR > kInPlaceRows) {
    if (MR - 4 >= args.rows) return tile_rows<Op, MR - 4, NV, HasHalf>(args);
    tile_staged<Op, MR, NV, HasHalf>(args);
  } else {
    if constexpr (MR > 1)
      if (MR - 1 >= args.rows) return tile_rows<Op, MR - 1, NV, HasHalf>(args);
    tile_in_place<Op, MR, NV, HasHalf>(args);
  }
}

template <class Op, int MR, int NV>
void tile_width(const moelora::TileArgs& args) {
  if constexpr (Op::has_half)
    if (args.half) return tile_rows<Op, MR, NV, true>(args);
  tile_rows<Op, MR, NV, false>(args);
}

// R1, R2, …: the tallest tile of 1, 2, … vectors; 0 where tiles are narrower.
template <class Op, int R1, int R2, int R3 = 0, int R4 = 0>
void tile_any(const moelora::TileArgs& args) {
  if (args.vecs == 1) return tile_width<Op, R1, 1>(args);
  if (R3 == 0 || args.vecs == 2) return tile_width<Op, R2, 2>(args);
  if constexpr (R3 > 0) {
    if (args.vecs == 3) return tile_width<Op, R3, 3>(args);
    tile_width<Op, R4, 4>(args);
  }
}

template <class Op, int R1, int R2, int R3 = 0, int R4 = 0>
void fill_tiles(moelora::Kernels& k) {
  k.compute = Op::compute;
  k.pack = Op::pack;
  k.lanes = Op::lanes;
  k.halves = Op::has_half;
  k.vecs = R3 > 0 ? 4 : 2;
  const int rows[moelora::kMaxTileVecs] = {R1, R2, R3, R4};
  for (int v = 0; v < moelora::kMaxTileVecs; ++v) k.max_rows[v] = rows[v];
  k.tile = tile_any<Op, R1, R2, R3, R4>;
}

}  // namespace
