#include "ops/gradients.h"

namespace moelora::ops {
namespace {

std::tuple<Tensor, Tensor> scatter_lora_dab(Tensor dy, Tensor x, Tensor sorted_scattered_idxs, Tensor expert_offsets,
                                            int64_t top_k, Tensor lora_a, Tensor lora_b, double scaling,
                                            OptionalTensor gates, bool x_grouped, bool y_grouped) {
  const Checker check("scatter_lora_dab");
  CheckedRouting index = check.routing(sorted_scattered_idxs, expert_offsets, top_k);
  Routing& r = index.routing;
  check.dy(dy, r, gates.has_value());
  check.floating("dy", dy);
  check.x(x, r, x_grouped);
  check.like("x", x, "dy", dy);
  check.lora(lora_a, lora_b, "dy", dy, r.experts, dy.size(1), x.size(1));
  check.finite("scaling", scaling);
  check.gates(gates, "dy", dy, r, y_grouped);
  check.contents(r);

  std::vector<double> by_slot;
  const GradientArgs args{r, dy, gates_of(gates, by_slot), x_grouped, y_grouped};
  const auto result = new_lora_gradient(args, x, lora_a, lora_b, scaling);
  lora_gradient(kernels_for(dtype_of(dy), batch_invariant()), result.op, runtime());
  return {result.da, result.db};
}

Tensor scatter_lora_dw(Tensor dy, Tensor x, Tensor sorted_scattered_idxs, Tensor expert_offsets, int64_t top_k,
                       OptionalTensor gates, bool x_grouped, bool y_grouped) {
  const Checker check("scatter_lora_dw");
  CheckedRouting index = check.routing(sorted_scattered_idxs, expert_offsets, top_k);
  Routing& r = index.routing;
  check.dy(dy, r, gates.has_value());
  check.floating("dy", dy);
  check.x(x, r, x_grouped);
  check.like("x", x, "dy", dy);
  check.gates(gates, "dy", dy, r, y_grouped);
  check.contents(r);

  Tensor dw = new_tensor(dy, {r.experts, dy.size(1), x.size(1)}, x.scalar_type());
  std::vector<double> by_slot;
  weight_gradient(kernels_for(dtype_of(dy)),
                  {.routing = r,
                   .dy = {matrix_of(dy), order_of_dy(gates.has_value(), y_grouped)},
                   .x = {matrix_of(x), order_of_x(x_grouped)},
                   .gates = gates_of(gates, by_slot),
                   .dw = dw.mutable_data_ptr()},
                  runtime());
  return dw;
}

Tensor scatter_lora_dbias(Tensor dy, Tensor sorted_scattered_idxs, Tensor expert_offsets, int64_t top_k,
                          OptionalTensor gates, bool y_grouped) {
  const Checker check("scatter_lora_dbias");
  CheckedRouting index = check.routing(sorted_scattered_idxs, expert_offsets, top_k);
  Routing& r = index.routing;
  check.dy(dy, r, gates.has_value());
  check.floating("dy", dy);
  check.gates(gates, "dy", dy, r, y_grouped);
  check.contents(r);

  Tensor dbias = new_tensor(dy, {r.experts, dy.size(1)}, dy.scalar_type());
  std::vector<double> by_slot;
  bias_gradient(kernels_for(dtype_of(dy)),
                {.routing = r,
                 .dy = {matrix_of(dy), order_of_dy(gates.has_value(), y_grouped)},
                 .gates = gates_of(gates, by_slot),
                 .dbias = dbias.mutable_data_ptr()},
                runtime());
  return dbias;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("scatter_lora_dab", TORCH_BOX(&scatter_lora_dab));
  m.impl("scatter_lora_dw", TORCH_BOX(&scatter_lora_dw));
  m.impl("scatter_lora_dbias", TORCH_BOX(&scatter_lora_dbias));
}

}  // namespace moelora::ops
