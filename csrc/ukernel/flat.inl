// The flat tile over a vector policy, for few rows. Include inside an instruction set's unit only.
//
// Op: as for tile.inl, and load_whole(T*), load_run(T*, n): a vector of a row of storage type T;
//     sums: accumulators that fit the registers beside operands
#pragma once

#include "ukernel/tile.inl"
#include "ukernel/ukernel.h"

namespace {

// Vectors of R's rows: in place, or of lines of a panel, of so many elements for each lane.
template <class Op, class T, int PerLane>
struct Rows {
  using elem = T;
  static constexpr int per_lane = PerLane;
  static constexpr int rows = 1;  // of R, a step
  template <int NV>
  static void load(typename Op::opvec (&line)[NV], const T* row, const T*) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) line[v] = Op::load_whole(row + v * Op::lanes * PerLane);
  }
  static void load_run(typename Op::opvec& line, const T* row, const T*, int64_t n) {
    line = Op::load_run(row, n * PerLane);
  }
};

// Of two rows in place, woven on the way; the second of the last step may be missing.
template <class Op, class T>
struct RowPairs {
  using elem = T;
  static constexpr int per_lane = 1;
  static constexpr int rows = 2;
  template <int NV>
  static void load(typename Op::opvec (&line)[NV], const T* row, const T* second) {
    if constexpr (NV == 2 && __is_same(T, typename Op::elem)) {
      if (second) {
        typename Op::unit units[2];
        Op::interleave_two(row, second, &units[0], &units[1]);
        line[0] = (typename Op::opvec)units[0];
        line[1] = (typename Op::opvec)units[1];
        return;
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v)
      load_run(line[v], row + v * Op::lanes, second ? second + v * Op::lanes : nullptr, Op::lanes);
  }
  static void load_run(typename Op::opvec& line, const T* row, const T* second, int64_t n) {
    line = (typename Op::opvec)Op::interleave(row, second, n);
  }
};

// C: [MR][width].
template <class Op, class Source, int MR>
void flat_tile(const moelora::FlatArgs& args) {
  constexpr int kFlatVecs = 2 * MR <= Op::sums ? 2 : 1;
  using acc_t = typename Op::acc_t;
  using elem = typename Source::elem;
  const auto l = [&](int i, int64_t p) {
    return reinterpret_cast<const typename Op::elem*>(static_cast<const char*>(args.l) + i * args.l_stride) + p;
  };
  const int64_t steps = (args.depth + Op::pack - 1) / Op::pack, block_lanes = kFlatVecs * Op::lanes;
  Fetcher ahead(args.ahead, (args.width + block_lanes - 1) / block_lanes * steps);
  const auto block = [&]<int NV>(int64_t j, const auto& load, const auto& load_c,
                                 const auto& store_c) __attribute__((always_inline)) {
    typename Op::vec acc[MR][NV];
    acc_t* c = static_cast<acc_t*>(args.c) + j;
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        acc[i][v] = args.start == moelora::Start::resume ? load_c(c + i * args.ldc + v * Op::lanes) : Op::zero();
    const char* row = reinterpret_cast<const char*>(static_cast<const elem*>(args.r) + j * Source::per_lane);
    const auto step = [&](int64_t p, const char* second, const auto& broadcast) __attribute__((always_inline)) {
      typename Op::opvec line[NV];
      load(line, reinterpret_cast<const elem*>(row), reinterpret_cast<const elem*>(second));
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i) {
        const typename Op::opvec a = broadcast(l(i, p));
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[i][v] = Op::fma(a, line[v], acc[i][v]);
      }
      ahead.step();
      row += Source::rows * args.r_stride;
    };
    int64_t p = 0;
    for (; p + Op::pack <= args.depth; p += Op::pack)
      step(p, row + args.r_stride, [](const auto* at) { return Op::broadcast(at); });
    if constexpr (Op::pack > 1)
      if (p < args.depth) step(p, nullptr, [](const auto* at) { return Op::broadcast_last(at); });
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) store_c(c + i * args.ldc + v * Op::lanes, acc[i][v]);
  };
  const auto load_c = [](const acc_t* from) { return Op::load(from); };
  const auto store_c = [](acc_t* to, typename Op::vec v) { Op::store(to, v); };
  int64_t j = 0;
  for (; j + block_lanes <= args.width; j += block_lanes)
    block.template operator()<kFlatVecs>(
        j, [](auto& line, const elem* row, const elem* second) { Source::load(line, row, second); }, load_c, store_c);
  for (; j < args.width; j += Op::lanes) {
    const int64_t left = args.width - j, n = left < Op::lanes ? left : Op::lanes;
    block.template operator()<1>(
        j, [n](auto& line, const elem* row, const elem* second) { Source::load_run(line[0], row, second, n); },
        [n](const acc_t* from) { return Op::load_n(from, n); },
        [n](acc_t* to, typename Op::vec v) { Op::store_n(to, v, n); });
  }
}

template <class Op, class Source, int MR = moelora::kMaxFlatRows>
void flat_any(const moelora::FlatArgs& args) {
  if constexpr (MR > 1)
    if (args.rows < MR) return flat_any<Op, Source, MR - 1>(args);
  flat_tile<Op, Source, MR>(args);
}

}  // namespace
