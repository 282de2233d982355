// Pieces of one expert's weight as operands. Loops ask for them here and never look at dtype, strides or codes.
#pragma once

#include <optional>

#include "core/weights.h"
#include "dispatch/table.h"
#include "driver/packed_rows.h"
#include "driver/strided.h"

namespace moelora {

// Rows of lanes as they lie in memory: [steps][lanes] in the compute type.
struct LaneRows {
  const char* data;
  int64_t stride;  // bytes
};

// How a strip of panels of the widest tile lies in memory: lines of `line` lanes each, panels `apart` bytes from one to
// the next. Each by itself, or side by side in lines as long as the strip is wide, which is how codes are unpacked.
struct StripLayout {
  bool side_by_side;
  int64_t line, apart, bytes;

  StripLayout(const Kernels& k, bool beside, int64_t width, int64_t steps) : side_by_side(beside) {
    const int64_t lanes = k.lanes * k.vecs, lane_bytes = k.pack * size_of(k.compute);
    // An odd number of cache lines, so that lines do not share sets.
    line = beside ? (ceil_div(round_up(width, lanes) * lane_bytes, 64) | 1) * 64 / lane_bytes : lanes;
    apart = beside ? lanes * lane_bytes : panel_bytes(k, steps, lanes);
    bytes = (beside ? 1 : ceil_div(width, lanes)) * panel_bytes(k, steps, line);
  }
};

// Outputs [out, out + width), steps [p, p + steps) of an expert's weights.
struct Region {
  int64_t expert = 0, out = 0, width = 0, p = 0, steps = 0;
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
    if (packed_) return unpacked_rows(out, count, p, steps, false, arena);
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
  DotOperand dot_rows(int64_t out, int64_t count, int64_t p, int64_t steps, bool fetch, Arena& arena) const;
  // The dot tile of such rows without making them. False: they must be.
  bool dot_codes(int64_t out, int64_t count, int64_t p, int64_t steps, bool fetch, const DotArgs& args,
                 Arena& arena) const {
    return has_dot_codes() && packed_->dot({out, count, p, steps}, args, fetch ? 2 * count : 0, arena);
  }
  // Whether that may be.
  bool has_dot_codes() const { return packed_ && !turned_; }
  // Whether dot_rows fetches what follows itself.
  bool dot_rows_fetch() const { return packed_.has_value(); }
  // Whether `rows` take so much work that whoever needs the same ones should have them made once.
  bool rows_are_dear() const { return packed_.has_value(); }
  // What such rows will be made of.
  Ahead rows_ahead(int64_t out, int64_t count, int64_t p, int64_t steps) const;

  // Outputs [out, out + width) as lanes of panels, `apart` bytes from one to the next, steps [p, p + steps).
  void strip(int64_t out, int64_t width, int64_t p, int64_t steps, void* panels, int64_t lanes, int64_t apart,
             Arena& arena) const {
    if (packed_) return unpacked_strip(out, width, p, steps, panels, lanes, apart, arena);
    pack_panels(k_, matrix_, out, width, p, steps, panels, lanes, apart, arena);
  }
  void strip(int64_t out, int64_t width, int64_t p, int64_t steps, char* panels, const StripLayout& layout,
             Arena& arena) const;
  // What such a strip will be made of.
  Ahead strip_ahead(int64_t out, int64_t width, int64_t p, int64_t steps) const;

  // Whether tiles can convert `rows` or a `strip` of such regions on the way, and what they are asked for then.
  bool widens_rows(const Region& region) const {
    return can_widen() && !in_place() && matrix_.col_stride == 1 && region.steps % (kWidenVecs * k_.lanes) == 0;
  }
  bool widens_strip(const Region& region) const {
    return can_widen() && matrix_.row_stride == 1 && region.width % (k_.lanes * k_.vecs) == 0;
  }
  // Where an output's step is stored, of such weights.
  const char* at(int64_t out, int64_t p) const { return matrix_.at(out, p); }
  int64_t element_size() const { return size_of(matrix_.dtype); }
  Widen widen_rows(const Region& region, const LeftRows& to) const;
  Widen widen_strip(const Region& region, char* panels, const StripLayout& layout) const;

  // Rows of lanes for flat tiles, which take some storage types as they are.
  struct FlatOperand {
    LaneRows rows;
    DType storage;
    bool lines = false;  // of a panel
  };
  bool flat_as_stored() const {
    return !packed_ && k_.flat_tile[static_cast<int>(matrix_.dtype)] && (matrix_.row_stride == 1 || matrix_.rows <= 1);
  }
  FlatOperand flat_rows(int64_t out, int64_t p) const { return {lane_rows(out, p), matrix_.dtype}; }

  // Whether there are `lines`: lanes of a panel, unpacked.
  bool has_lines() const { return packed_ && turned_; }
  // Outputs [out, out + width) as lanes of lines `stride` bytes apart, steps [p, p + steps); the same of steps so far
  // ahead will be wanted soon.
  void lines(int64_t out, int64_t width, int64_t p, int64_t steps, void* to, int64_t stride, int64_t ahead,
             Arena& arena) const {
    packed_->unpack_lines({p, steps, out, width}, to, stride, ahead, arena);
  }
  // The flat tile of such lines without making them. False: they must be.
  bool flat_codes(int64_t out, int64_t width, int64_t p, int64_t steps, int64_t ahead, const FlatArgs& args,
                  Arena& arena) const {
    return packed_->flat({p, steps, out, width}, args, ahead, arena);
  }

  // Whether tiles can pack such a strip themselves, from `lane_rows`.
  bool weaves(int64_t width, int64_t steps) const;
  LaneRows lane_rows(int64_t out, int64_t p) const {
    return {matrix_.at(out, p), matrix_.col_stride * size_of(matrix_.dtype)};
  }

 private:
  bool can_widen() const { return k_.widens && !packed_ && matrix_.dtype == DType::bf16; }
  LeftRows unpacked_rows(int64_t out, int64_t count, int64_t p, int64_t steps, bool fetch, Arena& arena) const;
  void unpacked_strip(int64_t out, int64_t width, int64_t p, int64_t steps, void* panels, int64_t lanes, int64_t apart,
                      Arena& arena) const;

  const Kernels& k_;
  const Matrix matrix_;  // a packed weight's numbers, as they would lie in memory
  const bool turned_;
  std::optional<PackedRows> packed_;
};

// Whether the weights are read in the order of their memory as `rows`, else as strips.
inline bool rows_are_contiguous(const Weights& w) { return w.numbers.col_stride == 1 || w.numbers.cols == 1; }

// How many outputs and steps of them are made into a strip at once, where there are so many.  thin: for few rows
struct StripSize {
  int64_t width, steps;
};
StripSize strip_size(const Weights& w, const Blocking& blocking, bool thin);

}  // namespace moelora
