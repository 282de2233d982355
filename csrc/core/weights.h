// What a weight is: a stack of matrices, stored plainly or packed.
#pragma once

#include "core/codes.h"
#include "core/views.h"

namespace moelora {

// How the numbers are stored; `formats/` has a row for each.
enum class Format : uint8_t { dense, nf4, fp4, int4, mxfp4, nvfp4, int8, fp8 };

// [experts, ceil(rows / rows_each), ceil(cols / cols_each)], one for so many rows and columns of codes. Strides count
// elements and may be anything.
struct Scales {
  const void* data = nullptr;
  ScaleType type = ScaleType::f32;
  int64_t expert_stride = 0, row_stride = 0, col_stride = 0;
  int64_t rows_each = 1, cols_each = 1;

  const void* at(int64_t expert, int64_t row_group, int64_t col_group) const {
    return static_cast<const char*>(data) +
           (expert * expert_stride + row_group * row_stride + col_group * col_stride) * size_of(type);
  }
};

// Codes [experts, rows, cols] and what turns them into numbers: (value − zero) · scale.
struct Packed {
  const uint8_t* codes = nullptr;  // columns follow each other
  int64_t rows = 0, cols = 0;
  int64_t expert_stride = 0, row_stride = 0;  // bytes
  Code code = Code::int8;
  const float* values = nullptr;  // [16], of nibbles
  Scales scale = {}, zero = {};   // zero: no data where there is none
  // What scales themselves are scaled by, fp32. With e4m3 scales [experts, parts of the rows]: factors. With indexed
  // ones [ceil(scales / kNestedBlock), 2]: factor and offset of so many successive scales.
  Matrix scale2 = {};
  const float* scale_values = nullptr;  // [256], of indexed scales
};
constexpr int64_t kNestedBlock = 256;

// [experts, rows, cols] numbers.
struct Weights {
  // A packed weight's have no data: they say how they would lie in memory, and what they are rounded to.
  Experts numbers = {};
  Packed packed = {};
  bool turned = false;  // packed: codes and scales are those of [experts, cols, rows]

  bool is_packed() const { return packed.codes != nullptr; }
  int64_t rows() const { return numbers.rows; }
  int64_t cols() const { return numbers.cols; }
  Weights transposed() const { return {numbers.transposed(), packed, is_packed() && !turned}; }
};

}  // namespace moelora
