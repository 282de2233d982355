#include "bindings/packed.h"

#include <algorithm>
#include <iterator>

#include "formats/formats.h"

namespace moelora {
namespace {

const FormatRow& packed_format(const std::string& name) {
  const auto* row = std::find_if(std::begin(kFormats), std::end(kFormats),
                                 [&](const FormatRow& r) { return r.format != Format::dense && name == r.name; });
  require(row != std::end(kFormats), "there is no packed format " + name);
  return *row;
}

bool has_bytes(const py::array& array) { return array.dtype().kind() == 'u' && array.itemsize() == 1; }

// What the array's type means to the format.
ScaleType stored_scale_type(const FormatRow& row, const py::array& scale) {
  const bool nested = row.second == Second::nested && has_bytes(scale);
  if (nested) return ScaleType::indexed;
  const ScaleType type = has_bytes(scale)              ? row.scales[0]
                         : scale.dtype().kind() == 'u' ? ScaleType::bf16
                         : scale.itemsize() == 2       ? ScaleType::f16
                                                       : ScaleType::f32;
  const ScaleType* end = row.scales + row.scale_types;
  require(
      std::find(row.scales, end, type) != end && size_of(type) == scale.itemsize(),
      std::string("scale must have a type that ") + row.name + " takes, got " + std::string(py::str(scale.dtype())));
  return type;
}

// Each of `parts` covers so many of `size`.
int64_t covered(const FormatRow& row, const char* what, int64_t size, int64_t parts) {
  const bool tiles = row.groups == Groups::tiles && parts != 1 && parts != size;
  require(parts >= 1 && (tiles ? parts == ceil_div(size, kTileSide) : size % parts == 0),
          std::string("scale must have parts of the ") + what);
  return tiles ? kTileSide : size / parts;
}

Scales strided_scales(const py::array& array, ScaleType type, int64_t rows_each, int64_t cols_each) {
  const int64_t size = size_of(type);
  for (int64_t i = 0; i < 3; ++i) require(array.strides(i) % size == 0, "scales must have strides of whole elements");
  return {array.data(), type,     array.strides(0) / size, array.strides(1) / size, array.strides(2) / size,
          rows_each,    cols_each};
}

// Of nested scales [runs, 2], else [experts, parts of the rows].
Matrix second_scales(const py::array& array, const Packed& packed, int64_t experts, int64_t scales) {
  const Array second("scale2", array);
  second.dtype(DType::f32).dims(2);
  if (packed.scale.type == ScaleType::indexed)
    second.shape({ceil_div(scales, kNestedBlock), 2});
  else
    require(second.shape({experts, -1}).size(1) >= 1 && packed.rows % second.size(1) == 0,
            "scale2 must divide the rows");
  return second.matrix();
}

}  // namespace

PackedArrays::PackedArrays(const py::array& codes, const std::string& format, const py::array& scale,
                           const OptionalArray& scale2, const OptionalArray& zero, bool transposed)
    : kept_{codes, scale}, transposed_(transposed) {
  const FormatRow& row = packed_format(format);
  require(codes.ndim() == 3 && has_bytes(codes) && (codes.shape(2) == 1 || codes.strides(2) == 1),
          "codes must be uint8 with three dimensions, the last one contiguous");
  experts_ = codes.shape(0);
  packed_ = {.codes = static_cast<const uint8_t*>(codes.data()),
             .rows = codes.shape(1),
             .cols = codes.shape(2) * 8 / bits_of(row.code),
             .expert_stride = codes.strides(0),
             .row_stride = codes.strides(1),
             .code = row.code,
             .values = zero ? row.values_with_zero : row.values};
  require(scale.ndim() == 3 && scale.shape(0) == experts_, "scale must have three dimensions, the first as codes");
  packed_.scale =
      strided_scales(scale, stored_scale_type(row, scale), covered(row, "rows", packed_.rows, scale.shape(1)),
                     covered(row, "columns", packed_.cols, scale.shape(2)));
  require(row.groups == Groups::tiles || packed_.scale.rows_each == 1, "scale must have as many rows as codes");
  require(row.groups != Groups::fixed || packed_.scale.cols_each == row.group, "scale must have the format's groups");
  const bool nested = packed_.scale.type == ScaleType::indexed;
  require(scale2.has_value() == (nested || row.second == Second::parts), "scale2 must be given where it is needed");
  if (scale2) {
    kept_.push_back(*scale2);
    packed_.scale2 = second_scales(*scale2, packed_, experts_, scale.size());
  }
  if (nested) packed_.scale_values = kNestedValues;
  if (!zero) return;
  require(row.values_with_zero && has_bytes(*zero) && zero->ndim() == 3 &&
              std::equal(scale.shape(), scale.shape() + 3, zero->shape()),
          "zero must be uint8 as scale, of a format that takes it");
  kept_.push_back(*zero);
  packed_.zero = strided_scales(*zero, ScaleType::u8, 1, packed_.scale.cols_each);
}

Weights PackedArrays::weights(DType numbers) const {
  const int64_t rows = packed_.rows, cols = packed_.cols;
  const Weights stored{{nullptr, numbers, experts_, rows, cols, rows * cols, cols, 1}, packed_, false};
  return transposed_ ? stored.transposed() : stored;
}

void bind_packed(py::module_& m) {
  using namespace py::literals;
  py::class_<PackedArrays>(m, "Packed", py::module_local(), "A packed weight for the drivers.")
      .def(py::init<const py::array&, const std::string&, const py::array&, const OptionalArray&, const OptionalArray&,
                    bool>(),
           "codes"_a, "format"_a, "scale"_a, "scale2"_a = py::none(), "zero"_a = py::none(), "transposed"_a = false);
}

}  // namespace moelora
