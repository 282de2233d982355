// Rows of an expert's packed weight, unpacked.
#pragma once

#include "core/arena.h"
#include "core/weights.h"
#include "ukernel/contract.h"

namespace moelora {

// Columns [first, first + n) of rows [row, row + rows) as stored.
struct PackedPart {
  int64_t row, rows, first, n;
};

class PackedRows {
 public:
  // values: the type that the numbers are rounded to.
  PackedRows(const Kernels& k, const Packed& packed, DType values, int64_t expert)
      : k_(k), packed_(packed), values_(values), expert_(expert) {}

  // In the compute type, rows `stride` bytes apart.  ahead: the same of rows so far on will be wanted soon, 0: none
  void unpack(const PackedPart& part, void* to, int64_t stride, int64_t ahead, Arena& arena) const;
  // As lines of a panel: rows are p, columns its lanes.
  void unpack_lines(const PackedPart& part, void* to, int64_t stride, int64_t ahead, Arena& arena) const;
  // The dot tile of such rows, without unpacking them first. False: nothing is done, they must be.
  bool dot(const PackedPart& part, const DotArgs& args, int64_t ahead, Arena& arena) const;
  // The same of the flat tile of their lines.
  bool flat(const PackedPart& part, const FlatArgs& args, int64_t ahead, Arena& arena) const;
  Ahead codes(const PackedPart& part) const;

 private:
  UnpackArgs unpack_args(const PackedPart& part, int64_t ahead, Arena& arena) const;
  bool read_scales(int64_t row, int64_t rows, int64_t group, int64_t n, int64_t ahead, float* to) const;
  bool read_nested(int64_t row, int64_t rows, int64_t group, int64_t n, int64_t ahead, float* to) const;
  int64_t rows_alike(int64_t row) const;

  const uint8_t* row_codes(int64_t row) const {
    return packed_.codes + expert_ * packed_.expert_stride + row * packed_.row_stride;
  }

  const Kernels& k_;
  const Packed& packed_;
  const DType values_;
  const int64_t expert_;
};

}  // namespace moelora
