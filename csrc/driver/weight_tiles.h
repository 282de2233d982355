// Pieces of one expert's weight as operands. Loops ask for them here and never look at dtype, strides or codes.
#pragma once

#include <optional>

#include "core/weights.h"
#include "driver/packed_rows.h"
#include "driver/strided.h"

namespace moelora {

// Rows of lanes as they lie in memory: [steps][lanes] in the compute type.
struct LaneRows {
  const char* data;
  int64_t stride;  // bytes
};

// [outputs, depth]
class WeightTiles {
 public:
  WeightTiles(const Kernels& k, const Weights& weights, int64_t expert)
      : k_(k), matrix_(weights.numbers[expert]), turned_(weights.turned) {
    if (weights.is_packed()) packed_.emplace(k, weights.packed, matrix_.dtype, expert);
  }
  WeightTiles(const Kernels& k, const Experts& dense, int64_t expert) : k_(k), matrix_(dense[expert]), turned_(false) {}

  int64_t outputs() const { return matrix_.rows; }
  int64_t depth() const { return matrix_.cols; }

  // Whether `rows` costs nothing.
  bool in_place() const { return !packed_ && rows_in_place(k_, matrix_); }

  // Outputs [out, out + count), steps [p, p + steps): unit stride, compute type. In place, or in `arena`.
  LeftRows rows(int64_t out, int64_t count, int64_t p, int64_t steps, Arena& arena) const {
    if (packed_) return unpacked_rows(out, count, p, steps, arena);
    return left_rows(k_, matrix_, out, count, p, steps, arena);
  }
  // The same for dot products, which take some storage types as they are.
  struct DotOperand {
    LeftRows rows;
    DType storage;
  };
  // Packed weights are asked what would hold for their numbers: they give the same sums.
  bool dots_as_stored() const {
    return k_.dot_tile[static_cast<int>(matrix_.dtype)] && (matrix_.col_stride == 1 || matrix_.cols <= 1);
  }
  DotOperand dot_rows(int64_t out, int64_t count, int64_t p, int64_t steps, Arena& arena) const;
  // What such rows will be made of.
  Ahead rows_ahead(int64_t out, int64_t count, int64_t p, int64_t steps) const;

  // Outputs [out, out + width) as lanes of panels, `apart` bytes from one to the next, steps [p, p + steps).
  void strip(int64_t out, int64_t width, int64_t p, int64_t steps, void* panels, int64_t lanes, int64_t apart,
             Arena& arena) const {
    if (packed_) return unpacked_strip(out, width, p, steps, panels, lanes, apart, arena);
    pack_panels(k_, matrix_, out, width, p, steps, panels, lanes, apart, arena);
  }
  // What such a strip will be made of.
  Ahead strip_ahead(int64_t out, int64_t width, int64_t p, int64_t steps) const;

  // Rows of lanes for flat tiles, which take some storage types as they are.
  struct FlatOperand {
    LaneRows rows;
    DType storage;
  };
  bool flat_as_stored() const {
    return !packed_ && k_.flat_tile[static_cast<int>(matrix_.dtype)] && (matrix_.row_stride == 1 || matrix_.rows <= 1);
  }
  FlatOperand flat_rows(int64_t out, int64_t p) const { return {lane_rows(out, p), matrix_.dtype}; }

  // Whether tiles can pack such a strip themselves, from `lane_rows`.
  bool weaves(int64_t width, int64_t steps) const;
  LaneRows lane_rows(int64_t out, int64_t p) const {
    return {matrix_.at(out, p), matrix_.col_stride * size_of(matrix_.dtype)};
  }

 private:
  LeftRows unpacked_rows(int64_t out, int64_t count, int64_t p, int64_t steps, Arena& arena) const;
  void unpacked_strip(int64_t out, int64_t width, int64_t p, int64_t steps, void* panels, int64_t lanes, int64_t apart,
                      Arena& arena) const;

  const Kernels& k_;
  const Matrix matrix_;  // a packed weight's numbers, as they would lie in memory
  const bool turned_;
  std::optional<PackedRows> packed_;
};

// Whether the weights are read in the order of their memory as `rows`, else as strips.
inline bool rows_are_contiguous(const Weights& w) { return w.numbers.col_stride == 1 || w.numbers.cols == 1; }

}  // namespace moelora
