// Checked numpy arrays as the core's views. bf16 is uint16, fp16 float16; strides may be anything unless a check
// forbids.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "core/views.h"
#include "ukernel/ukernel.h"

namespace moelora {

namespace py = pybind11;
using OptionalArray = std::optional<py::array>;

// An argument together with its name, so that every error names it. Checks raise ValueError.
class Array {
 public:
  Array(const char* name, const py::array& array);

  // -1 takes any size
  const Array& shape(std::initializer_list<int64_t> sizes) const;
  const Array& dims(int64_t n) const;
  const Array& dtype(DType wanted) const;
  const Array& unit_columns() const;  // neighbours of the last dimension are neighbours in memory
  const Array& contiguous() const;
  [[noreturn]] void fail(const std::string& expected) const;

  DType dtype() const { return dtype_; }
  int64_t size(int64_t i) const { return array_.shape(i); }
  int64_t stride(int64_t i) const;  // in elements
  const void* data() const { return array_.data(); }
  void* mutable_data() const;

  Matrix matrix() const { return {data(), dtype_, size(0), size(1), stride(0), stride(1)}; }
  Experts experts() const { return {data(), dtype_, size(0), size(1), size(2), stride(0), stride(1), stride(2)}; }

 private:
  const char* name_;
  py::array array_;
  DType dtype_;
};

std::string shape_text(const py::array& array);
void require(bool holds, const std::string& message);

inline DType accumulator_type(const Kernels& k) { return k.compute == DType::f64 ? DType::f64 : DType::f32; }

// What the kernels hold for this storage type; ValueError where they do not take it.
template <class F>
F for_storage(F const (&table)[kDTypes], const Kernels& k, const char* name, DType storage) {
  F function = table[static_cast<int>(storage)];
  require(function != nullptr,
          std::string(name) + " must have a dtype that " + k.name + " takes, got " + name_of(storage));
  return function;
}

GluArgs glu_args(const std::string& act, double alpha, std::optional<double> limit, double up_shift, bool interleaved);

void bind_arena(py::module_& m);
void bind_contract(py::module_& m);
void bind_kernels(py::module_& m);
void bind_drivers(py::module_& m);
void bind_unpack(py::module_& m);

}  // namespace moelora
