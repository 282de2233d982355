// Multiply-adds at the rate of the registers: the ceiling that tiles are compared with.
#pragma once

#include "ukernel/ukernel.h"

namespace {

// Op: as of the tile. Left × Right sums are in flight: more than the latency of what is issued twice a cycle asks for,
// each with a product of its own, and no more than registers hold beside Left + 1 operands. The right side changes all
// the time: operands that stay cost less power, and processors clock higher.
template <class Op, int Left, int Right>
double peak(void* c, const void* values, int64_t rounds) {
  using vec = typename Op::vec;
  using elem = typename Op::elem;
  constexpr int kSums = Left * Right, kWidth = Op::lanes * Op::pack;
  constexpr int64_t kSteps = moelora::kPeakValues / (Right * kWidth);
  const elem* p = static_cast<const elem*>(values);
  typename Op::opvec left[Left];
  vec sums[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < Left; ++i) left[i] = Op::load_panel(p + i * kWidth);
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sums[i] = Op::zero();
  for (int64_t round = 0; round < rounds; ++round)
    for (const elem* line = p; line < p + kSteps * Right * kWidth; line += Right * kWidth) {
#pragma GCC unroll 8
      for (int j = 0; j < Right; ++j) {
        const auto right = Op::load_panel(line + j * kWidth);
        asm volatile("" ::: "memory");  // one load for all its products, or loads would be the limit
#pragma GCC unroll 8
        for (int i = 0; i < Left; ++i) sums[j * Left + i] = Op::fma(left[i], right, sums[j * Left + i]);
      }
    }
#pragma GCC unroll 16
  for (int i = 1; i < kSums; ++i) sums[0] = Op::add(sums[0], sums[i]);
  Op::store(static_cast<typename Op::acc_t*>(c), sums[0]);
  return 2.0 * kSums * kWidth * static_cast<double>(kSteps * rounds);
}

}  // namespace
