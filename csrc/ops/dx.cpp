#include "ops/gradients.h"

namespace moelora::ops {
namespace {

std::tuple<Tensor, Tensor> scatter_lora_dx(Tensor dy, Tensor weight, Tensor sorted_scattered_idxs,
                                           Tensor expert_offsets, int64_t top_k, OptionalTensor lora_a,
                                           OptionalTensor lora_b, double scaling, OptionalTensor bias,
                                           OptionalTensor gates, OptionalTensor x, bool x_grouped, bool y_grouped,
                                           OptionalTensor weight_scale, OptionalTensor weight_scale2,
                                           OptionalTensor weight_zero, std::string weight_format,
                                           bool weight_transposed, bool sum_fp32) {
  const Checker check("scatter_lora_dx");
  CheckedRouting index = check.routing(sorted_scattered_idxs, expert_offsets, top_k);
  Routing& r = index.routing;
  check.dy(dy, r, gates.has_value());
  check.floating("dy", dy);
  const Weights w =
      check.weight({weight, weight_scale, weight_scale2, weight_zero, weight_format, weight_transposed}, "dy", dy, r);
  check.columns("dy", dy, "N", w.rows(), "weight");
  check.lora(lora_a, lora_b, "dy", dy, r.experts, w.rows(), w.cols());
  check.finite("scaling", scaling);
  check.bias(bias, "dy", dy, r.experts, w.rows());
  check.gates(gates, "dy", dy, r, y_grouped);
  if (x) {
    check.x(*x, r, x_grouped);
    check.like("x", *x, "dy", dy);
    check.columns("x", *x, "K", w.cols(), "weight");
  }
  check.contents(r);

  std::vector<double> by_slot;
  const GradientArgs args{r, dy, gates_of(gates, by_slot), x_grouped, y_grouped, sum_fp32};
  const auto result = new_input_gradient(args, w, lora_of(lora_a, lora_b, scaling), bias, x, gates && x);
  input_gradient(kernels_for(dtype_of(dy), batch_invariant()), result.op, runtime());
  return {result.dx, result.dgates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scatter_lora_backward(
    Tensor dy, Tensor x, Tensor weight, Tensor sorted_scattered_idxs, Tensor expert_offsets, int64_t top_k,
    Tensor lora_a, Tensor lora_b, double scaling, OptionalTensor bias, OptionalTensor gates, bool x_grouped,
    bool y_grouped, bool with_dgates, OptionalTensor weight_scale, OptionalTensor weight_scale2,
    OptionalTensor weight_zero, std::string weight_format, bool weight_transposed, bool sum_fp32) {
  const Checker check("scatter_lora_backward");
  CheckedRouting index = check.routing(sorted_scattered_idxs, expert_offsets, top_k);
  Routing& r = index.routing;
  check.dy(dy, r, gates.has_value());
  check.floating("dy", dy);
  check.x(x, r, x_grouped);
  check.like("x", x, "dy", dy);
  const Weights w =
      check.weight({weight, weight_scale, weight_scale2, weight_zero, weight_format, weight_transposed}, "dy", dy, r);
  check.columns("dy", dy, "N", w.rows(), "weight");
  check.columns("x", x, "K", w.cols(), "weight");
  check.lora(lora_a, lora_b, "dy", dy, r.experts, w.rows(), w.cols());
  check.finite("scaling", scaling);
  check.bias(bias, "dy", dy, r.experts, w.rows());
  check.gates(gates, "dy", dy, r, y_grouped);
  check.contents(r);

  std::vector<double> by_slot;
  const GradientArgs args{r, dy, gates_of(gates, by_slot), x_grouped, y_grouped, sum_fp32};
  const auto rows = new_input_gradient(args, w, lora_of(lora_a, lora_b, scaling), bias, x, gates && with_dgates);
  const auto lora = new_lora_gradient(args, x, lora_a, lora_b, scaling);
  input_and_lora_gradient(kernels_for(dtype_of(dy), batch_invariant()), rows.op, lora.op, runtime());
  return {rows.dx, rows.dgates, lora.da, lora.db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("scatter_lora_dx", TORCH_BOX(&scatter_lora_dx));
  m.impl("scatter_lora_backward", TORCH_BOX(&scatter_lora_backward));
}

}  // namespace moelora::ops
