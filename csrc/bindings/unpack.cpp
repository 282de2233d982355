// Unpacking by every usable kernel set, on arrays that the caller provides.
#include <algorithm>
#include <iterator>

#include "bindings/arrays.h"
#include "dispatch/table.h"
#include "ukernel/contract.h"

namespace moelora {
namespace {

template <class T>
struct Named {
  const char* name;
  T value;
};
constexpr Named<Code> kCodeNames[] = {{"nibbles_high", Code::nibbles_high},
                                      {"nibbles_low", Code::nibbles_low},
                                      {"int8", Code::int8},
                                      {"e4m3", Code::e4m3}};
constexpr Named<DType> kNumberNames[] = {{"bf16", DType::bf16}, {"fp16", DType::f16}, {"fp32", DType::f32}};
constexpr Named<ScaleType> kScaleNames[] = {
    {"fp32", ScaleType::f32},  {"bf16", ScaleType::bf16}, {"fp16", ScaleType::f16},        {"e8m0", ScaleType::e8m0},
    {"e4m3", ScaleType::e4m3}, {"u8", ScaleType::u8},     {"indexed", ScaleType::indexed},
};
static_assert(std::size(kCodeNames) == kCodes && std::size(kScaleNames) == kScaleTypes);

template <class T, size_t N>
T named(const Named<T> (&table)[N], const std::string& name) {
  const auto* row = std::find_if(std::begin(table), std::end(table), [&](const Named<T>& n) { return name == n.name; });
  require(row != std::end(table), "there is no " + name);
  return row->value;
}

using Bytes = py::array_t<uint8_t>;
using Floats = py::array_t<float, py::array::c_style>;

// codes: [rows][bytes].  scale, zero: [rows][groups], of the groups of columns [first, first + n).
struct PackedRowsGiven {
  Code code;
  UnpackArgs args;  // all but where to

  PackedRowsGiven(const Bytes& codes, const std::string& code_name, const Floats& scale, int64_t group, int64_t first,
                  int64_t n, const std::optional<Floats>& values, const std::optional<Floats>& zero, bool ordinary)
      : code(named(kCodeNames, code_name)) {
    require(codes.ndim() == 2 && codes.strides(1) == 1, "codes must have two dimensions, the last one contiguous");
    const int64_t rows = codes.shape(0);
    require(first >= 0 && n >= 1 && group >= 1, "first must be at least 0, n and group 1");
    require((first + n) * bits_of(code) <= codes.shape(1) * 8, "codes must hold first + n columns");
    require(bits_of(code) == 8 || (values && values->size() == 16), "nibbles need 16 values");
    const int64_t groups = (first + n - 1) / group - first / group + 1;
    require(scale.ndim() == 2 && scale.shape(0) == rows && scale.shape(1) == groups,
            "scale must be [rows, groups], got " + shape_text(scale));
    require(!zero || (zero->ndim() == 2 && zero->shape(0) == rows && zero->shape(1) == groups),
            "zero must be as scale");
    args = {codes.data(),
            codes.strides(0),
            rows,
            first,
            n,
            values ? values->data() : nullptr,
            scale.data(),
            zero ? zero->data() : nullptr,
            groups,
            group,
            ordinary,
            nullptr,
            0,
            codes.strides(0)};
  }
};

// to: [rows][n], or as lines [ceil(rows / pack)][n][pack].
void unpack_rows(const KernelChoice& choice, const py::array& to, const Bytes& codes, const std::string& code_name,
                 const std::string& numbers, const Floats& scale, int64_t group, int64_t first, int64_t n,
                 const std::optional<Floats>& values, const std::optional<Floats>& zero, bool ordinary, bool lines) {
  const Kernels& k = *choice.kernels;
  PackedRowsGiven given(codes, code_name, scale, group, first, n, values, zero, ordinary);
  const DType type = named(kNumberNames, numbers);
  require(k.unpack[static_cast<int>(given.code)][static_cast<int>(type)] != nullptr, "kernels must take " + numbers);
  const Array out("to", to);
  out.dtype(k.compute).unit_columns();
  const int64_t rows = given.args.rows;
  if (lines)
    out.shape({(rows + k.pack - 1) / k.pack, n, k.pack});
  else
    out.shape({rows, n});
  given.args.to = out.mutable_data();
  given.args.to_stride = out.stride(0) * size_of(k.compute);
  lines ? run_unpack_lines(k, given.code, type, given.args) : run_unpack(k, given.code, type, given.args);
}

// c: [cols][rows].  x: [cols][n].  Whether there was a way.
bool dot_codes(const KernelChoice& choice, const py::array& c, const Bytes& codes, const std::string& code_name,
               const Floats& scale, int64_t group, int64_t first, int64_t n, const std::optional<Floats>& values,
               const std::optional<Floats>& zero, const py::array& x) {
  const Kernels& k = *choice.kernels;
  const PackedRowsGiven given(codes, code_name, scale, group, first, n, values, zero, true);
  if (k.dot_codes[static_cast<int>(given.code)] == nullptr) return false;
  const Array to("c", c), r("x", x);
  const int64_t rows = given.args.rows;
  to.dtype(accumulator_type(k)).shape({-1, rows}).unit_columns();
  const int64_t cols = to.size(0);
  require(cols >= 1 && cols <= k.dot_codes_cols && rows <= k.dot_rows[cols - 1], "c must be what a tile takes");
  r.dtype(k.compute).shape({cols, n}).unit_columns();
  DotArgs args{};
  args.segments[0] = {nullptr, 0, r.data(), r.stride(0) * size_of(k.compute), n};
  args.n_segments = 1;
  args.rows = static_cast<int>(rows);
  args.cols = static_cast<int>(cols);
  args.c = to.mutable_data();
  args.ldc = to.stride(0);
  return run_dot_codes(k, given.code, given.args, args);
}

// c: [height][n].  l: [height][rows].  Whether there was a way.
bool flat_codes(const KernelChoice& choice, const py::array& c, const Bytes& codes, const std::string& code_name,
                const Floats& scale, int64_t group, int64_t first, int64_t n, const std::optional<Floats>& values,
                const std::optional<Floats>& zero, const py::array& l, bool resume) {
  const Kernels& k = *choice.kernels;
  const PackedRowsGiven given(codes, code_name, scale, group, first, n, values, zero, true);
  if (k.flat_codes[static_cast<int>(given.code)] == nullptr) return false;
  const Array to("c", c), left("l", l);
  to.dtype(accumulator_type(k)).shape({-1, n}).unit_columns();
  const int64_t height = to.size(0), depth = given.args.rows;
  require(height >= 1 && height <= k.flat_codes_rows && depth <= kMaxFlatCodesDepth, "c must be what a tile takes");
  left.dtype(k.compute).shape({height, depth}).unit_columns();
  return run_flat_codes(k, given.code, given.args,
                        {left.data(),
                         left.stride(0) * size_of(k.compute),
                         nullptr,
                         0,
                         depth,
                         n,
                         static_cast<int>(height),
                         to.mutable_data(),
                         to.stride(0),
                         resume ? Start::resume : Start::zero,
                         {}});
}

// to: [rows][n].  source: [rows][n] of any strides.
bool read_scales(const KernelChoice& choice, const Floats& to, const py::array& source, const std::string& type_name,
                 float factor, float offset, const std::optional<Floats>& values) {
  const Kernels& k = *choice.kernels;
  const ScaleType type = named(kScaleNames, type_name);
  const int64_t size = size_of(type);
  require(source.ndim() == 2 && source.itemsize() == size, "source must be [rows, n] of the type");
  require(to.ndim() == 2 && to.shape(0) == source.shape(0) && to.shape(1) == source.shape(1), "to must be as source");
  require(type != ScaleType::indexed || (values && values->size() == 256), "indexed scales need 256 values");
  Floats out = to;
  return run_scales(
      k, type,
      {source.data(), source.shape(0), source.shape(1), source.strides(0) / size, source.strides(1) / size, factor,
       offset, values ? values->data() : nullptr, out.mutable_data(), 1});
}

}  // namespace

void bind_unpack(py::module_& m) {
  using namespace py::literals;
  m.def("unpack", &unpack_rows, "kernels"_a, "to"_a, "codes"_a, "code"_a, "numbers"_a, "scale"_a, "group"_a,
        "first"_a = 0, "n"_a = 0, "values"_a = py::none(), "zero"_a = py::none(), "ordinary"_a = false,
        "lines"_a = false, "Columns [first, first + n) of packed rows as numbers, or as lines of a panel.");
  m.def("dot_codes", &dot_codes, "kernels"_a, "c"_a, "codes"_a, "code"_a, "scale"_a, "group"_a, "first"_a, "n"_a,
        "values"_a, "zero"_a, "x"_a, "The dot tile of packed rows as they are; False, and nothing done, if none is.");
  m.def("flat_codes", &flat_codes, "kernels"_a, "c"_a, "codes"_a, "code"_a, "scale"_a, "group"_a, "first"_a, "n"_a,
        "values"_a, "zero"_a, "l"_a, "resume"_a, "The flat tile of packed rows as they are; else as dot_codes.");
  m.def("read_scales", &read_scales, "kernels"_a, py::arg("to").noconvert(), "source"_a, "type"_a, "factor"_a = 1.0f,
        "offset"_a = 0.0f, "values"_a = py::none(), "Scales in fp32; whether all are ordinary.");
}

}  // namespace moelora
