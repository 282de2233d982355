// Between tensors of the stable ABI and the core's views. Unsupported dtypes are caught by checks.h before these run.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "core/views.h"
#include "driver/drivers.h"

namespace moelora::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline ScalarType scalar_type(DType t) {
  switch (t) {
    case DType::bf16: return ScalarType::BFloat16;
    case DType::f16: return ScalarType::Half;
    case DType::f32: return ScalarType::Float;
    default: return ScalarType::Double;
  }
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Float: return DType::f32;
    default: return DType::f64;
  }
}

// What sums of such rows come back in where they are not to be rounded.
inline DType sum_type(const Tensor& t) { return dtype_of(t) == DType::f64 ? DType::f64 : DType::f32; }

inline Matrix matrix_of(const Tensor& t) {
  return {t.const_data_ptr(), dtype_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}
inline Matrix matrix_of(const OptionalTensor& t) { return t ? matrix_of(*t) : Matrix{}; }

inline Experts experts_of(const Tensor& t) {
  return {t.const_data_ptr(), dtype_of(t), t.size(0), t.size(1), t.size(2), t.stride(0), t.stride(1), t.stride(2)};
}

inline Lora lora_of(const OptionalTensor& a, const OptionalTensor& b, double scaling) {
  return a ? Lora{experts_of(*a), experts_of(*b), scaling} : Lora{};
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// Whether calls of this thread are to be batch invariant: `moelora_set_batch_invariant` of the process, unless
// `moelora_override_batch_invariant` of the thread says otherwise.
bool batch_invariant();

// Torch's threads, and this thread's scratch.
const Runtime& runtime();

// The gates by slot; null where there are none. `storage` keeps them alive.
const double* gates_of(const OptionalTensor& gates, std::vector<double>& storage);

}  // namespace moelora::ops
