// Dot products of rows and weight rows, both as they are. For few rows.
#pragma once

#include "driver/block.h"
#include "driver/weight_tiles.h"

namespace moelora {

class DotRows {
 public:
  DotRows(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range, Arena& arena);

  // c: [rows][ldc] = outputs [out, out + width).  fetch: these weight rows are new to the caches.
  void operator()(int64_t out, int64_t width, bool fetch, char* c, int64_t ldc, Arena& arena) const;
  // The pass from step p on alone, of weight rows at hand, in the compute type.
  void pass(const LeftRows& w, int64_t out, int64_t width, int64_t p, char* c, int64_t ldc, Arena& arena) const;

 private:
  int64_t steps_from(int64_t p) const { return min64(choice_.blocking.dot_depth, w_.depth() - p); }
  bool joins_lora(int64_t p) const { return rank_ && p + steps_from(p) == w_.depth(); }
  DotArgs tile_args(const LeftRows& w, const LeftRows& b, int64_t height, int64_t p, int64_t g, char* c,
                    int64_t ldc) const;
  Ahead after(int64_t out, int64_t height, int64_t p) const;
  bool codes_row(int64_t out, int64_t height, int64_t p, bool fetch, char* c, int64_t ldc, Arena& arena) const;
  void tile_row(const WeightTiles::DotOperand& w, const Ahead& ahead, int64_t out, int64_t height, int64_t p, char* c,
                int64_t ldc, Arena& arena) const;

  const KernelChoice& choice_;
  const WeightTiles w_, b_;
  const int64_t rank_, rows_, groups_;
  int64_t height_ = 1;
  LeftRows x_{}, u_{};
};

}  // namespace moelora
