// What a weight is: a stack of matrices, stored plainly or packed.
#pragma once

#include "core/views.h"

namespace moelora {

// How the numbers are stored; `formats/` has a row for each.
enum class Format : uint8_t { dense };

// [experts, rows, cols] numbers. A dense weight says with its strides how it lies in memory, a packed one with
// `turned`: then codes and scales are those of [experts, cols, rows].
struct Weights {
  Experts codes;  // as stored; of a dense weight the numbers themselves
  Format format = Format::dense;
  bool turned = false;

  int64_t experts() const { return codes.experts; }
  int64_t rows() const { return turned ? codes.cols : codes.rows; }
  int64_t cols() const { return turned ? codes.rows : codes.cols; }
  Weights transposed() const {
    if (format == Format::dense) return {codes.transposed()};
    return {codes, format, !turned};
  }
};

}  // namespace moelora
