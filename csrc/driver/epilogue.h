// What happens to rows of accumulators once the contraction is done.
#pragma once

#include "driver/block.h"

namespace moelora {

class Epilogue {
 public:
  Epilogue(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range, const TokenSums* sums,
           Arena& arena);

  // Before the contraction of rows from `position` on, outputs [out0, out0 + width).
  void expect(int64_t position, int64_t rows, int64_t out0, int64_t width) const;

  // c: [rows] of accumulators, `pitch` bytes apart, of outputs [out0, out0 + width).
  void operator()(int64_t position, int64_t rows, const char* c, int64_t pitch, int64_t out0, int64_t width) const;

 private:
  char* sum_of(int64_t slot, int64_t out0) const;
  void fetch(int64_t position, int64_t out0, int64_t width) const;
  void finish(int64_t position, const char* c, int64_t out0, int64_t width) const;

  const Kernels& k_;
  const GroupedLinear& op_;
  const TokenSums* sums_;
  const int64_t segment_;
  const char* bias_ = nullptr;
  int64_t bias_out0_ = 0;
};

}  // namespace moelora
