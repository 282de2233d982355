// Results of the gradient operators, and the drivers' arguments that fill them.
#pragma once

#include "ops/checks.h"

namespace moelora::ops {

inline RowOrder order_of_dy(bool gated, bool y_grouped) {
  return gated ? RowOrder::token : y_grouped ? RowOrder::grouped : RowOrder::scattered;
}
inline RowOrder order_of_x(bool x_grouped) { return x_grouped ? RowOrder::grouped : RowOrder::token; }

// What the gradient operators are given beside weight, x and LoRA.
struct GradientArgs {
  const Routing& routing;
  const Tensor& dy;
  const double* gates;  // [S] by slot, or null
  bool x_grouped, y_grouped;
  bool sum_fp32 = false;

  RowsIn dy_rows() const { return {matrix_of(dy), order_of_dy(gates != nullptr, y_grouped)}; }
};

struct InputGradientResult {
  Tensor dx, dgates;
  InputGradient op;
};
// dgates: where the gates' gradient is wanted, else size 0.
InputGradientResult new_input_gradient(const GradientArgs& args, const Weights& weight, const Lora& lora,
                                       const OptionalTensor& bias, const OptionalTensor& x, bool with_dgates);

struct LoraGradientResult {
  Tensor da, db;
  LoraGradient op;
};
LoraGradientResult new_lora_gradient(const GradientArgs& args, const Tensor& x, const Tensor& lora_a,
                                     const Tensor& lora_b, double scaling);

}  // namespace moelora::ops
