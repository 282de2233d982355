// The tile over a vector policy. Include inside an instruction set's unit only.
//
// Op: elem, acc_t, vec (accumulators), opvec (operands), lanes, pack,
//     broadcast(elem*), broadcast_last(elem*) (one element where pack is 2), load_panel(elem*), fma(opvec, opvec, vec),
//     stage(elem* dst, const elem* src, n): copies n <= kStage elements, zeros up to kStage
//     weave(const elem* a, const elem* b, opvec (&line)[4]): a line of the panel from two rows of 4 · lanes, if weaves
//     widens: whether it has load_whole(const bf16_t*), a vector of converted numbers, and store_units
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

  explicit Accumulators(const moelora::TileArgs& args) {
    const auto* c = static_cast<const typename Op::acc_t*>(args.c);
    const int held = args.start == moelora::Start::resume ? args.rows : 0;
#pragma GCC unroll 24
    for (int i = 0; i < MR; ++i) {
      const auto* from = c + i * args.ldc;
#pragma GCC unroll 4
      for (int v = 0; v < kFull; ++v) full[i][v] = i < held ? Op::load(from + v * Op::lanes) : Op::zero();
      if constexpr (HasHalf) half[i] = i < held ? Half::load(from + kFull * Op::lanes) : Half::zero();
    }
  }

  // One line of the panel.
  struct Line {
    typename Op::opvec full[kFull > 0 ? kFull : 1];
    typename Half::opvec half;
  };
  [[gnu::always_inline]] static Line load(const elem* r) {
    Line line;
#pragma GCC unroll 4
    for (int v = 0; v < kFull; ++v) line.full[v] = Op::load_panel(r + v * Op::lanes * Op::pack);
    if constexpr (HasHalf) line.half = Half::load_panel(r + kFull * Op::lanes * Op::pack);
    return line;
  }

  // Adds L's p-th pack (row i at l(i)) times a line.
  template <bool Last, class LeftAt>
  [[gnu::always_inline]] void step(const LeftAt& l, const Line& line) {
#pragma GCC unroll 24
    for (int i = 0; i < MR; ++i) {
      if constexpr (kFull > 0) {
        const typename Op::opvec a = Last ? Op::broadcast_last(l(i)) : Op::broadcast(l(i));
#pragma GCC unroll 4
        for (int v = 0; v < kFull; ++v) full[i][v] = Op::fma(a, line.full[v], full[i][v]);
        if constexpr (HasHalf) half[i] = Half::fma(Op::low_half(a), line.half, half[i]);
      } else {
        half[i] = Half::fma(Last ? Half::broadcast_last(l(i)) : Half::broadcast(l(i)), line.half, half[i]);
      }
    }
  }

  void store(const moelora::TileArgs& args) const {
    using acc_t = typename Op::acc_t;
    acc_t* c = static_cast<acc_t*>(args.c);
    const bool add = args.start == moelora::Start::add;
#pragma GCC unroll 24
    for (int i = 0; i < MR; ++i) {
      if (i >= args.rows) return;
      acc_t* to = c + i * args.ldc;
#pragma GCC unroll 4
      for (int v = 0; v < kFull; ++v, to += Op::lanes)
        Op::store(to, add ? Op::add(full[i][v], Op::load(to)) : full[i][v]);
      if constexpr (HasHalf) Half::store(to, add ? Half::add(half[i], Half::load(to)) : half[i]);
    }
  }
};

// Of counts of steps and lines, which are small: half the time of a 64-bit division, which every tile would wait for.
inline int64_t quotient(int64_t a, int64_t b) { return static_cast<uint32_t>(a) / static_cast<uint32_t>(b); }

// What a tile does beside its products: `turns` times, evenly over its steps.
struct Turns {
  int64_t every, wait;

  Turns(int64_t steps, int64_t turns) : every(turns > 0 ? quotient(steps, turns) : steps), wait(every) {}

  [[gnu::always_inline]] bool next() {
    if (--wait > 0) return false;
    wait = every;
    return true;
  }
};

// Fetches the lines of an Ahead, in the order of their memory. Evenly: rows may lie in as many pages, whose addresses
// take time to look up.
struct Fetcher {
  moelora::Ahead ahead;
  int64_t lines, left, per_turn;
  Turns turns;
  const char* at = nullptr;
  const char* run_end = nullptr;

  Fetcher(const moelora::Ahead& args, int64_t steps)
      : Fetcher(args, steps, lines_of(args) < steps ? lines_of(args) : steps) {}

  Fetcher(const moelora::Ahead& args, int64_t steps, int64_t n_turns)
      : ahead(args), lines((args.bytes + 63) / 64), left(lines_of(args)), turns(steps, n_turns) {
    const int64_t n = left > 0 && turns.every > 0 ? quotient(steps, turns.every) : 0;
    per_turn = n > 0 ? quotient(left + n - 1, n) : 0;
    if (left > 0) start_run();
  }

  static int64_t lines_of(const moelora::Ahead& ahead) { return (ahead.bytes + 63) / 64 * ahead.rows; }

  void start_run() {
    at = ahead.runs ? static_cast<const char*>(*ahead.runs++) + ahead.offset : static_cast<const char*>(ahead.from);
    ahead.from = at + ahead.stride;
    run_end = at + lines * 64;
  }

  [[gnu::always_inline]] void fetch() {
    for (int64_t i = 0; i < per_turn; ++i) {
      if (left == 0) return;
      if (ahead.to_l1)
        __builtin_prefetch(at, 0, moelora::kToL1);
      else
        __builtin_prefetch(at, 0, moelora::kToL2);
      at += 64;
      if (--left > 0 && at == run_end) start_run();
    }
  }

  [[gnu::always_inline]] void step() {
    if (turns.next()) fetch();
  }
};

// Writes the lines of a Weave, and fetches an Ahead by the way.
template <class Op>
struct Weaver {
  using elem = typename Op::elem;
  int64_t left;
  Fetcher ahead;
  const char* rows;
  elem* panel;
  int64_t stride, line;

  Weaver(const moelora::TileArgs& args, int64_t steps)
      : left(args.weave.depth / Op::pack),
        ahead(args.ahead, steps, left),
        rows(static_cast<const char*>(args.weave.rows)),
        panel(static_cast<elem*>(args.weave.panel)),
        stride(args.weave.rows_stride),
        line(args.panel_lanes * Op::pack) {}

  [[gnu::always_inline]] void step() {
    if (!ahead.turns.next()) return;
    ahead.fetch();
    if (left == 0) return;
    --left;
    typename Op::opvec woven[4];
    Op::weave(reinterpret_cast<const elem*>(rows), reinterpret_cast<const elem*>(rows + stride), woven);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) Op::store_operand(panel + v * Op::lanes * Op::pack, woven[v]);
    rows += 2 * stride;
    panel += line;
  }
};

// Rows of L in place: one pointer a row.
template <class Op, int MR>
struct LeftPointers {
  using elem = typename Op::elem;
  const elem* row[MR];

  explicit LeftPointers(const moelora::Segment& segment) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
      row[i] = reinterpret_cast<const elem*>(static_cast<const char*>(segment.l) + i * segment.l_stride);
  }
  [[gnu::always_inline]] auto at(int64_t p) const {
    return [this, p](int i) { return row[i] + p * Op::pack; };
  }
};

// beside.step() is called once a step.
template <class Op, int MR, int NV, bool HasHalf, class Beside>
[[gnu::always_inline]] inline void multiply_packed(Accumulators<Op, MR, NV, HasHalf>& acc,
                                                   const moelora::Segment& segment, int64_t panel_lanes,
                                                   Beside& beside) {
  const LeftPointers<Op, MR> l(segment);
  const auto* r = static_cast<const typename Op::elem*>(segment.r);
  const int64_t line = panel_lanes * Op::pack, steps = segment.depth / Op::pack;
  for (int64_t p = 0; p < steps; ++p, r += line) {
    acc.template step<false>(l.at(p), acc.load(r));
    beside.step();
  }
  if (segment.depth % Op::pack != 0) acc.template step<true>(l.at(steps), acc.load(r));
}

// Converts rows [first, end) of a Widen, a unit of Vecs vectors after each call of before().
template <class Op, int Vecs, class Before>
[[gnu::always_inline]] inline void widen_rows(const moelora::Widen& job, int64_t first, int64_t end,
                                              const Before& before) {
  constexpr int64_t kUnit = Vecs * Op::lanes;
  for (int64_t row = first; row < end; ++row) {
    const char* at = job.runs ? static_cast<const char*>(job.runs[row]) + job.offset
                              : static_cast<const char*>(job.from) + row * job.stride;
    const auto* from = reinterpret_cast<const moelora::bf16_t*>(at);
    char* to = static_cast<char*>(job.to) + row * job.to_stride;
    const int64_t ahead = job.ahead, apart = job.units_apart;
    for (const auto* row_end = from + job.n; from < row_end; from += kUnit, to += apart) {
      before();
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v)
        Op::store_units(reinterpret_cast<typename Op::elem*>(to) + v * Op::lanes, Op::load_whole(from + v * Op::lanes));
      __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead, 0, moelora::kToL2);
    }
  }
}

// The same, beside the segment's products: evenly, in turns whose length does not change, which the processor foresees.
template <int Vecs, class Op, int MR, int NV, bool HasHalf>
[[gnu::always_inline]] inline void multiply_widening(Accumulators<Op, MR, NV, HasHalf>& acc,
                                                     const moelora::Segment& segment, int64_t panel_lanes,
                                                     const moelora::Widen& job) {
  const LeftPointers<Op, MR> l(segment);
  const auto* r = static_cast<const typename Op::elem*>(segment.r);
  const int64_t steps = segment.depth, in_row = quotient(job.n, Vecs * Op::lanes), fit = quotient(steps, in_row);
  // Rows for which there are no steps.
  const int64_t before = job.rows > fit ? job.rows - fit : 0;
  widen_rows<Op, Vecs>(job, 0, before, [] {});
  int64_t p = 0;
  if (before < job.rows) {
    const int64_t every = quotient(steps, (job.rows - before) * in_row);
    widen_rows<Op, Vecs>(job, before, job.rows, [&]() __attribute__((always_inline)) {
      for (int64_t i = every; i > 0; --i, ++p, r += panel_lanes) acc.template step<false>(l.at(p), acc.load(r));
    });
  }
  for (; p < steps; ++p, r += panel_lanes) acc.template step<false>(l.at(p), acc.load(r));
}

struct Alone {
  void step() {}
};

// C: [MR, NV · lanes], L in place.
template <class Op, int Vecs, int MR, int NV, bool HasHalf>
void tile_widening(const moelora::TileArgs& args) {
  Accumulators<Op, MR, NV, HasHalf> acc(args);
  multiply_widening<Vecs>(acc, args.segments[0], args.panel_lanes, args.widen);
  Alone alone;
  if (args.n_segments == 2) multiply_packed(acc, args.segments[1], args.panel_lanes, alone);
  acc.store(args);
}

// C: [MR, NV · lanes], L in place.
template <class Op, int MR, int NV, bool HasHalf>
void tile_in_place(const moelora::TileArgs& args) {
  Accumulators<Op, MR, NV, HasHalf> acc(args);
  Fetcher ahead(args.ahead, args.segments[0].depth / Op::pack);
  for (int s = 0; s < args.n_segments; ++s) multiply_packed(acc, args.segments[s], args.panel_lanes, ahead);
  acc.store(args);
}

// The same for a tile that weaves for others.
template <class Op, int MR>
void tile_beside_weaving(const moelora::TileArgs& args) {
  Accumulators<Op, MR, 4, false> acc(args);
  Weaver<Op> weaver(args, args.segments[0].depth / Op::pack);
  multiply_packed(acc, args.segments[0], args.panel_lanes, weaver);
  if (args.n_segments == 2) multiply_packed(acc, args.segments[1], args.panel_lanes, weaver.ahead);
  acc.store(args);
}

constexpr int64_t kWeaveAhead = 32;  // rows

// C: [MR, 4 · lanes], L in place, the first segment's panel written on the way.
template <class Op, int MR>
void tile_weaving(const moelora::TileArgs& args) {
  using elem = typename Op::elem;
  Accumulators<Op, MR, 4, false> acc(args);
  const moelora::Segment& segment = args.segments[0];
  Fetcher ahead(args.ahead, segment.depth / Op::pack);
  const LeftPointers<Op, MR> l(segment);
  const char* a = static_cast<const char*>(segment.rows);
  elem* r = static_cast<elem*>(segment.panel);
  for (int64_t p = 0; p < segment.depth; p += 2, a += 2 * segment.rows_stride) {
    // A panel takes too little of each row for the processor to see it coming.
    if (p + kWeaveAhead < segment.depth)
      for (int64_t q = 0; q < 2; ++q)
        for (int64_t line = 0; line < 4 * Op::lanes * static_cast<int64_t>(sizeof(elem)); line += 64)
          __builtin_prefetch(a + (kWeaveAhead + q) * segment.rows_stride + line, 0, moelora::kToL2);
    typename Accumulators<Op, MR, 4, false>::Line line;
    Op::weave(reinterpret_cast<const elem*>(a), reinterpret_cast<const elem*>(a + segment.rows_stride), line.full);
    if (r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) Op::store_operand(r + v * Op::lanes * Op::pack, line.full[v]);
      r += args.panel_lanes * Op::pack;
    }
    acc.template step<false>(l.at(p / Op::pack), line);
    ahead.step();
  }
  if (args.n_segments == 2) multiply_packed(acc, args.segments[1], args.panel_lanes, ahead);
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
  Accumulators<Op, MR, NV, HasHalf> acc(args);
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
        acc.template step<false>([&](int i) { return l + i * kStage + q * Op::pack; }, acc.load(r));
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
    if constexpr (Op::widens) {
      if (args.widen.unit == moelora::kWidenVecs * Op::lanes)
        widen_rows<Op, moelora::kWidenVecs>(args.widen, 0, args.widen.rows, [] {});
      else
        widen_rows<Op, Op::widest>(args.widen, 0, args.widen.rows, [] {});
    }
    tile_staged<Op, MR, NV, HasHalf>(args);
  } else {
    if constexpr (MR > 1)
      if (MR - 1 >= args.rows) return tile_rows<Op, MR - 1, NV, HasHalf>(args);
    if constexpr (Op::widens)
      if (args.widen.rows > 0)
        return args.widen.unit == moelora::kWidenVecs * Op::lanes
                   ? tile_widening<Op, moelora::kWidenVecs, MR, NV, HasHalf>(args)
                   : tile_widening<Op, Op::widest, MR, NV, HasHalf>(args);
    tile_in_place<Op, MR, NV, HasHalf>(args);
  }
}

template <class Op, int MR, int NV>
void tile_width(const moelora::TileArgs& args) {
  if constexpr (Op::has_half)
    if (args.half) return tile_rows<Op, MR, NV, true>(args);
  tile_rows<Op, MR, NV, false>(args);
}

template <class Op, int MR>
void weaving_rows(const moelora::TileArgs& args) {
  if constexpr (MR > 1)
    if (MR - 1 >= args.rows) return weaving_rows<Op, MR - 1>(args);
  args.segments[0].rows ? tile_weaving<Op, MR>(args) : tile_beside_weaving<Op, MR>(args);
}

// R1, R2, …: the tallest tile of 1, 2, … vectors; 0 where tiles are narrower.
template <class Op, int R1, int R2, int R3 = 0, int R4 = 0>
void tile_any(const moelora::TileArgs& args) {
  if constexpr (Op::weaves)
    if (args.segments[0].rows || args.weave.depth) return weaving_rows<Op, R4>(args);
  if constexpr (R4 > 0)
    if (args.vecs == 4) return tile_width<Op, R4, 4>(args);
  if constexpr (R3 > 0)
    if (args.vecs == 3) return tile_width<Op, R3, 3>(args);
  args.vecs == 2 ? tile_width<Op, R2, 2>(args) : tile_width<Op, R1, 1>(args);
}

template <class Op, int R1, int R2, int R3 = 0, int R4 = 0>
void fill_tiles(moelora::Kernels& k) {
  k.compute = Op::compute;
  k.pack = Op::pack;
  k.lanes = Op::lanes;
  k.halves = Op::has_half;
  k.weaves = Op::weaves;
  k.widens = Op::widens;
  const int rows[moelora::kMaxTileVecs] = {R1, R2, R3, R4};
  for (int v = 0; v < moelora::kMaxTileVecs; ++v) {
    k.max_rows[v] = rows[v];
    if (rows[v] > 0) k.vecs = v + 1;
  }
  k.tile = tile_any<Op, R1, R2, R3, R4>;
}

}  // namespace
