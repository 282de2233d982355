// The dot orientation over a vector policy, for few columns. Include inside an instruction set's unit only.
//
// Op: as for tile.inl, and load_run(T*, n): lanes · pack elements of a row of storage type T, those from n on zero;
//     load_whole(T*): all of them; dot_rows[columns - 1]: the tallest tile whose accumulators fit the registers;
//     sum_of_four(vec, vec, vec, vec, acc_t*): four sums over lanes, in a fixed order;
//     keep(opvec&), where a set offers it: has the operand in a register
#pragma once

#include "ukernel/tile.inl"
#include "ukernel/ukernel.h"

namespace {

// Adds one segment's products to acc [NC][MR]. L's elements are of type T and widened on the way.
template <class Op, class T, int MR, int NC>
[[gnu::always_inline]] inline void add_dots(typename Op::vec (&acc)[NC][MR], const moelora::DotSegment& segment,
                                            int rows, const moelora::Ahead& ahead) {
  using elem = typename Op::elem;
  constexpr int64_t kRun = Op::lanes * Op::pack;
  const T* l[MR];
  const elem* r[NC];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
    l[i] =
        reinterpret_cast<const T*>(static_cast<const char*>(segment.l) + (i < rows ? i : rows - 1) * segment.l_stride);
#pragma GCC unroll 8
  for (int j = 0; j < NC; ++j)
    r[j] = reinterpret_cast<const elem*>(static_cast<const char*>(segment.r) + j * segment.r_stride);
  const auto step = [&](int64_t p, const auto& load) __attribute__((always_inline)) {
    typename Op::opvec a[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) a[i] = load(l[i] + p);
#pragma GCC unroll 8
    for (int j = 0; j < NC; ++j) {
      typename Op::opvec b = load(r[j] + p);
      // Loaded once: folded into every product, loads would be the limit.
      if constexpr (requires { Op::keep(b); }) Op::keep(b);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) acc[j][i] = Op::fma(a[i], b, acc[j][i]);
    }
  };
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T)), kStride = kLine > kRun ? kLine : kRun;
  int64_t p = 0;
  const auto steps = [&](auto beside) __attribute__((always_inline)) {
    for (int64_t next = 0; p + kRun <= segment.depth; next += kStride) {
      beside.step();
      for (; p < next + kStride && p + kRun <= segment.depth; p += kRun)
        step(p, [](const auto* at) { return Op::load_whole(at); });
    }
  };
  ahead.rows > 0 ? steps(Fetcher(ahead, segment.depth / kStride)) : steps(Alone{});
  const int64_t left = segment.depth - p;
  if (left > 0) step(p, [left](const auto* at) { return Op::load_run(at, left); });
}

// The second segment, and the sums to C.
template <class Op, int MR, int NC>
[[gnu::always_inline]] inline void finish_dots(typename Op::vec (&acc)[NC][MR], const moelora::DotArgs& args) {
  using acc_t = typename Op::acc_t;
  if (args.n_segments == 2) add_dots<Op, typename Op::elem>(acc, args.segments[1], args.rows, {});
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

// C: [NC][MR], vectors of the depth on both sides. The first segment's L is of storage type T.
template <class Op, class T, int MR, int NC>
void dot_tile(const moelora::DotArgs& args) {
  typename Op::vec acc[NC][MR];
#pragma GCC unroll 8
  for (int j = 0; j < NC; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) acc[j][i] = Op::zero();
  add_dots<Op, T>(acc, args.segments[0], args.rows, args.ahead);
  finish_dots<Op>(acc, args);
}

template <class Op, class T, int NC = moelora::kMaxDotCols>
void dot_any(const moelora::DotArgs& args) {
  if constexpr (NC > 1)
    if (args.cols < NC) return dot_any<Op, T, NC - 1>(args);
  dot_tile<Op, T, Op::dot_rows[NC - 1], NC>(args);
}

template <class Op, class T>
void fill_dot(moelora::Kernels& k, moelora::DType storage) {
  for (int j = 0; j < moelora::kMaxDotCols; ++j) k.dot_rows[j] = Op::dot_rows[j];
  k.dot_tile[static_cast<int>(storage)] = dot_any<Op, T>;
}

}  // namespace
