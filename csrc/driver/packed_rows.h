// Rows of an expert's packed weight, unpacked.
#pragma once

#include "core/arena.h"
#include "core/weights.h"
#include "ukernel/ukernel.h"

namespace moelora {

class PackedRows {
 public:
  // values: the type that the numbers are rounded to.
  PackedRows(const Kernels& k, const Packed& packed, DType values, int64_t expert)
      : k_(k),
        packed_(packed),
        expert_(expert),
        unpack_(k.unpack[static_cast<int>(packed.code)][static_cast<int>(values)]) {}

  // Columns [first, first + n) of a row as stored, in the compute type.
  void unpack(int64_t row, int64_t first, int64_t n, void* to, Arena& arena) const;
  // Their codes, of `rows` rows.
  Ahead ahead(int64_t row, int64_t rows, int64_t first, int64_t n) const;

 private:
  void read_scales(int64_t row, int64_t first, int64_t n, float* to) const;

  const uint8_t* row_codes(int64_t row) const {
    return packed_.codes + expert_ * packed_.expert_stride + row * packed_.row_stride;
  }

  const Kernels& k_;
  const Packed& packed_;
  const int64_t expert_;
  void (*const unpack_)(const UnpackArgs&);
};

}  // namespace moelora
