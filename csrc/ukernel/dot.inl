// The dot orientation over a vector policy, for few columns. Include inside an instruction set's unit only.
//
// Op: as for tile.inl, and load_run(elem*, n): lanes · pack elements of a row, those from n on zero;
//     sum_of_four(vec, vec, vec, vec, acc_t*): four sums over lanes, in a fixed order
#pragma once

#include "ukernel/tile.inl"
#include "ukernel/ukernel.h"

namespace {

// C: [NC][MR], vectors of the depth on both sides.
template <class Op, int MR, int NC>
void dot_tile(const moelora::DotArgs& args) {
  using elem = typename Op::elem;
  using acc_t = typename Op::acc_t;
  constexpr int64_t kRun = Op::lanes * Op::pack;
  typename Op::vec acc[NC][MR];
#pragma GCC unroll 8
  for (int j = 0; j < NC; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) acc[j][i] = Op::zero();
  for (int s = 0; s < args.n_segments; ++s) {
    const moelora::DotSegment& segment = args.segments[s];
    const elem *l[MR], *r[NC];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const int64_t row = i < args.rows ? i : args.rows - 1;
      l[i] = reinterpret_cast<const elem*>(static_cast<const char*>(segment.l) + row * segment.l_stride);
    }
#pragma GCC unroll 8
    for (int j = 0; j < NC; ++j)
      r[j] = reinterpret_cast<const elem*>(static_cast<const char*>(segment.r) + j * segment.r_stride);
    const auto step = [&](int64_t p, const auto& load) __attribute__((always_inline)) {
      typename Op::opvec a[MR];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) a[i] = load(l[i] + p);
#pragma GCC unroll 8
      for (int j = 0; j < NC; ++j) {
        const typename Op::opvec b = load(r[j] + p);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) acc[j][i] = Op::fma(a[i], b, acc[j][i]);
      }
    };
    int64_t p = 0;
    for (; p + kRun <= segment.depth; p += kRun) {
      step(p, [](const elem* at) { return Op::load_panel(at); });
      // All rows side by side: memory delivers that faster than one row after the other.
      if (s == 0)
        for (int64_t i = 0; i < args.ahead.rows; ++i)
          __builtin_prefetch(static_cast<const char*>(args.ahead.from) + i * args.ahead.stride + p * sizeof(elem), 0,
                             2);
    }
    const int64_t left = segment.depth - p;
    if (left > 0) step(p, [left](const elem* at) { return Op::load_run(at, left); });
  }
#pragma GCC unroll 8
  for (int j = 0; j < NC; ++j) {
    acc_t sums[(MR + 3) / 4 * 4];
#pragma GCC unroll 2
    for (int i = 0; i < MR; i += 4) {
      const auto row = [&](int q) { return i + q < MR ? acc[j][i + q < MR ? i + q : 0] : Op::zero(); };
      Op::sum_of_four(row(0), row(1), row(2), row(3), sums + i);
    }
    acc_t* c = static_cast<acc_t*>(args.c) + j * args.ldc;
    for (int i = 0; i < args.rows; ++i) c[i] = args.accumulate ? c[i] + sums[i] : sums[i];
  }
}

constexpr int kDotRows[moelora::kMaxDotCols] = {8, 8, 8, 6, 4, 4};

template <class Op, int NC = moelora::kMaxDotCols>
void dot_any(const moelora::DotArgs& args) {
  if constexpr (NC > 1)
    if (args.cols < NC) return dot_any<Op, NC - 1>(args);
  dot_tile<Op, kDotRows[NC - 1], NC>(args);
}

template <class Op>
void fill_dot(moelora::Kernels& k) {
  for (int j = 0; j < moelora::kMaxDotCols; ++j) k.dot_rows[j] = kDotRows[j];
  k.dot_tile = dot_any<Op>;
}

}  // namespace
