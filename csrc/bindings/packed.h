// A packed weight on arrays that the caller provides, for the drivers.
#pragma once

#include <variant>

#include "bindings/arrays.h"
#include "core/weights.h"

namespace moelora {

// codes: bytes [experts, rows, of a row].  The others as the table of formats has them (docs/formats.md); bf16 is
// uint16, and what has a byte is uint8. Strides may be anything but the codes' last.
class PackedArrays {
 public:
  PackedArrays(const py::array& codes, const std::string& format, const py::array& scale, const OptionalArray& scale2,
               const OptionalArray& zero, bool transposed);

  // Its numbers are rounded to `numbers`. Valid as long as this is.
  Weights weights(DType numbers) const;

 private:
  std::vector<py::array> kept_;
  int64_t experts_;
  Packed packed_;
  bool transposed_;
};

// What drivers take as a weight.
using WeightArray = std::variant<py::array, PackedArrays>;

void bind_packed(py::module_& m);

}  // namespace moelora
