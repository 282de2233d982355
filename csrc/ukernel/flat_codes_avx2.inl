// Flat tiles of packed weights as they are, for few rows, on AVX2: codes of two rows are unpacked to registers, from
// which their products are added to C. Through memory, lines of all outputs would be more than L1 holds.
#pragma once

#include "ukernel/dot_codes_avx2.inl"
#include "ukernel/flat.inl"

namespace {

// Of so many rows C stays in L1, too.
constexpr int kFlatCodesRows = 3;

// Lanes of 8-bit codes, and of E4M3 ones those for which tables do not serve one by one.
template <Code C, class Lanes>
struct ByteLanes {
  Lanes lanes;
  float scale = 1.0f;

  explicit ByteLanes(const UnpackArgs&) {}
  void use(const UnpackArgs& w, int64_t row, int64_t group) {
    scale = w.scale[row * w.scale_stride + group];
    if (Lanes::takes(scale)) lanes.use(scale);
  }
  template <class Put>
  [[gnu::always_inline]] void operator()(const uint8_t* codes, const Put& put) {
    lanes(codes, put);
    if (Lanes::takes(scale) && !lanes.failed()) return;
    for (int at = 0; at < kCodesLanes; at += 8)
      put(Avx2Unpack::round_as(_mm256_mul_ps(Avx2Unpack::bytes<C>(codes + at, 8), _mm256_set1_ps(scale)), bf16_t{}),
          at);
  }
};

// Columns [j, stop) of C [MR][width], steps p and p + 1.  groups: of a chunk of 32 columns; 0: they are of one that
// goes on.
template <class Op, Code C, int MR, class Lanes>
[[gnu::always_inline]] inline void add_two_rows(const UnpackArgs& w, const moelora::FlatArgs& args, int64_t p,
                                                int64_t j, int64_t stop, int64_t groups, Lanes (&lanes)[2],
                                                Fetcher& ahead) {
  using vec = typename Op::vec;
  vec a[MR][2];
#pragma GCC unroll 3
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q)
      a[i][q] =
          Op::broadcast(reinterpret_cast<const float*>(static_cast<const char*>(args.l) + i * args.l_stride) + p + q);
  const bool fresh = p == 0 && args.start == moelora::Start::zero;
  const uint8_t* rows = w.codes + p * w.codes_stride;
  int64_t group = (w.first + j) / w.group - w.first / w.group, left = 0;
  for (; j < stop; j += kCodesLanes) {
    if (left == 0) {
      lanes[0].use(w, p, group);
      lanes[1].use(w, p + 1, group);
      left = groups > 0 ? kCodesLanes : w.group - (w.first + j) % w.group;
      group += groups > 0 ? groups : 1;
    }
    left -= kCodesLanes;
    ahead.step();
    const uint8_t* codes = rows + (w.first + j) * moelora::bits_of(C) / 8;
    vec v[2][4];
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q)
      lanes[q](codes + q * w.codes_stride,
               [&v, q](__m256 numbers, int at) __attribute__((always_inline)) { v[q][at / 8] = numbers; });
#pragma GCC unroll 3
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        float* to = static_cast<float*>(args.c) + i * args.ldc + j + 8 * n;
        const vec sum = Op::fma(a[i][0], v[0][n], fresh ? Op::zero() : Op::load(to));
        Op::store(to, Op::fma(a[i][1], v[1][n], sum));
      }
  }
}

template <class Op, Code C, class Lanes, int MR>
void flat_codes_tile(const UnpackArgs& w, const moelora::FlatArgs& args, int64_t groups) {
  Fetcher ahead(args.ahead, args.depth / 2 * (args.width / kCodesLanes));
  Lanes lanes[2] = {Lanes(w), Lanes(w)};
  // What an E4M3 scale needs is much, and the same for many rows.
  for (int64_t j = 0, stop; j < args.width; j = stop) {
    stop = C == Code::e4m3 ? j + w.group - (w.first + j) % w.group : args.width;
    if (stop > args.width) stop = args.width;
    for (int64_t p = 0; p < args.depth; p += 2) add_two_rows<Op, C, MR>(w, args, p, j, stop, groups, lanes, ahead);
  }
}

template <class Op, Code C, class Lanes, int MR = kFlatCodesRows>
bool flat_codes_any(const UnpackArgs& w, const moelora::FlatArgs& args, int64_t groups) {
  if constexpr (MR > 1)
    if (args.rows < MR) return flat_codes_any<Op, C, Lanes, MR - 1>(w, args, groups);
  flat_codes_tile<Op, C, Lanes, MR>(w, args, groups);
  return true;
}

template <class Op, Code C>
bool flat_codes(const UnpackArgs& given, const moelora::FlatArgs& args) {
  const UnpackArgs w = given;  // not in memory that stores might change
  if (w.first % kCodesLanes != 0 || w.n % kCodesLanes != 0 || w.rows % 2 != 0) return false;
  const bool whole = w.group % kCodesLanes == 0;
  if constexpr (C == Code::int8) {
    return whole && flat_codes_any<Op, C, ByteLanes<C, Int8Lanes>>(w, args, 0);
  } else if constexpr (C == Code::e4m3) {
    return whole && flat_codes_any<Op, C, ByteLanes<C, E4m3Lanes>>(w, args, 0);
  } else {
    constexpr bool kHigh = C == Code::nibbles_high;
    if (w.zero) return whole && flat_codes_any<Op, C, NibbleLanes<kHigh, true>>(w, args, 0);
    if (w.group == 16) return flat_codes_any<Op, C, ScaledLanes<kHigh, 16, true>>(w, args, 2);
    if (w.group == 32 && products_are_exact(w)) return flat_codes_any<Op, C, ScaledLanes<kHigh, 32, false>>(w, args, 1);
    return whole && flat_codes_any<Op, C, NibbleLanes<kHigh, false>>(w, args, 0);
  }
}

// For numbers of bf16.
template <class Op>
void fill_flat_codes(moelora::Kernels& k) {
  k.flat_codes_rows = kFlatCodesRows;
  k.flat_codes[static_cast<int>(Code::nibbles_high)] = flat_codes<Op, Code::nibbles_high>;
  k.flat_codes[static_cast<int>(Code::nibbles_low)] = flat_codes<Op, Code::nibbles_low>;
  k.flat_codes[static_cast<int>(Code::int8)] = flat_codes<Op, Code::int8>;
  k.flat_codes[static_cast<int>(Code::e4m3)] = flat_codes<Op, Code::e4m3>;
}

}  // namespace
