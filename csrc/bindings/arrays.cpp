#include "bindings/arrays.h"

#include <cmath>
#include <limits>

namespace moelora {
namespace {

DType storage_type(const char* name, const py::array& array) {
  const py::dtype t = array.dtype();
  if (t.byteorder() != '>') {
    if (t.kind() == 'u' && t.itemsize() == 2) return DType::bf16;
    if (t.kind() == 'f' && t.itemsize() == 2) return DType::f16;
    if (t.kind() == 'f' && t.itemsize() == 4) return DType::f32;
    if (t.kind() == 'f' && t.itemsize() == 8) return DType::f64;
  }
  throw py::value_error(std::string(name) + " must be uint16 (bf16), float16, float32 or float64, got " +
                        std::string(py::str(t)));
}

std::string sizes_text(std::initializer_list<int64_t> sizes) {
  std::string s;
  for (int64_t n : sizes) s += (s.empty() ? "" : ", ") + (n < 0 ? std::string("any") : std::to_string(n));
  return "[" + s + "]";
}

}  // namespace

void require(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

std::string shape_text(const py::array& array) {
  std::string s;
  for (int64_t i = 0; i < array.ndim(); ++i) s += (i ? ", " : "") + std::to_string(array.shape(i));
  return "[" + s + "]";
}

Array::Array(const char* name, const py::array& array) : name_(name), array_(array), dtype_(storage_type(name, array)) {
  if (reinterpret_cast<uintptr_t>(array.data()) % static_cast<uintptr_t>(size_of(dtype_)) != 0)
    fail("be aligned to its elements");
  for (int64_t i = 0; i < array.ndim(); ++i)
    if (array.strides(i) % size_of(dtype_) != 0) fail("have strides of whole elements");
}

void Array::fail(const std::string& expected) const {
  throw py::value_error(std::string(name_) + " must " + expected + ", got " + name_of(dtype_) + " of shape " +
                        shape_text(array_));
}

const Array& Array::dims(int64_t n) const {
  if (array_.ndim() != n) fail("have " + std::to_string(n) + " dimensions");
  return *this;
}

const Array& Array::shape(std::initializer_list<int64_t> sizes) const {
  bool same = array_.ndim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t n : sizes) {
    same = same && (n < 0 || array_.shape(i) == n);
    ++i;
  }
  if (!same) fail("have shape " + sizes_text(sizes));
  return *this;
}

const Array& Array::dtype(DType wanted) const {
  if (dtype_ != wanted) fail(std::string("be ") + name_of(wanted));
  return *this;
}

const Array& Array::unit_columns() const {
  const int64_t last = array_.ndim() - 1;
  if (size(last) > 1 && stride(last) != 1) fail("have neighbouring columns");
  return *this;
}

const Array& Array::contiguous() const {
  if (!(array_.flags() & py::array::c_style)) fail("be contiguous");
  return *this;
}

int64_t Array::stride(int64_t i) const { return array_.strides(i) / size_of(dtype_); }

void* Array::mutable_data() const {
  if (!array_.writeable()) fail("be writeable");
  return const_cast<void*>(array_.data());
}

GluArgs glu_args(const std::string& act, double alpha, std::optional<double> limit, double up_shift, bool interleaved) {
  require(act == "silu" || act == "gelu" || act == "gelu_tanh", "act must be silu, gelu or gelu_tanh, got " + act);
  require(std::isfinite(alpha) && std::isfinite(up_shift), "alpha and up_shift must be finite");
  require(!limit || *limit > 0, "limit must be None or greater than 0");
  const Activation kind = act == "silu" ? Activation::silu : act == "gelu" ? Activation::gelu : Activation::gelu_tanh;
  return {kind, alpha, limit.value_or(std::numeric_limits<double>::infinity()), up_shift, interleaved};
}

}  // namespace moelora
