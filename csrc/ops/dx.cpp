#include "ops/checks.h"

namespace moelora::ops {
namespace {

std::tuple<Tensor, Tensor> scatter_lora_dx(Tensor dy, Tensor weight, Tensor sorted_scattered_idxs,
                                           Tensor expert_offsets, int64_t top_k, OptionalTensor lora_a,
                                           OptionalTensor lora_b, double scaling, OptionalTensor bias,
                                           OptionalTensor gates, OptionalTensor x, bool x_grouped, bool y_grouped) {
  const Checker check("scatter_lora_dx");
  CheckedRouting index = check.routing(sorted_scattered_idxs, expert_offsets, top_k);
  Routing& r = index.routing;
  check.dy(dy, r, gates.has_value());
  check.floating("dy", dy);
  check.weight(weight, "dy", dy, r);
  check.columns("dy", dy, "N", weight.size(1), "weight");
  check.lora(lora_a, lora_b, "dy", dy, r.experts, weight.size(1), weight.size(2));
  check.finite("scaling", scaling);
  check.bias(bias, "dy", dy, r.experts, weight.size(1));
  check.gates(gates, "dy", dy, r, y_grouped);
  if (x) {
    check.x(*x, r, x_grouped);
    check.like("x", *x, "dy", dy);
    check.columns("x", *x, "K", weight.size(2), "weight");
  }
  check.contents(r);

  const bool wants_gates = gates && x;
  const ScalarType gate_type = dy.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor dx = new_tensor(dy, {x_grouped ? r.slots : r.tokens(), weight.size(2)}, dy.scalar_type());
  Tensor dgates = wants_gates ? new_tensor(dy, {r.tokens(), top_k}, gate_type) : new_tensor(dy, {0}, gate_type);
  std::vector<double> by_slot;
  const RowOrder dy_order = gates ? RowOrder::token : y_grouped ? RowOrder::grouped : RowOrder::scattered;
  const RowOrder x_order = x_grouped ? RowOrder::grouped : RowOrder::token;
  input_gradient(kernels_for(dtype_of(dy)),
                 {.routing = r,
                  .dy = {matrix_of(dy), dy_order},
                  .weight = experts_of(weight),
                  .lora = lora_of(lora_a, lora_b, scaling),
                  .bias = matrix_of(bias),
                  .gates = gates_of(gates, by_slot),
                  .x = {matrix_of(x), x_order},
                  .dx = dx.mutable_data_ptr(),
                  .dx_order = x_order,
                  .dgates = wants_gates ? dgates.mutable_data_ptr() : nullptr},
                 runtime());
  return {dx, dgates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("scatter_lora_dx", TORCH_BOX(&scatter_lora_dx)); }

}  // namespace moelora::ops
