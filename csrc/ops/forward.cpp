#include "ops/checks.h"

namespace moelora::ops {
namespace {

Tensor scatter_lora(Tensor x, Tensor weight, Tensor sorted_scattered_idxs, Tensor expert_offsets, int64_t top_k,
                    OptionalTensor lora_a, OptionalTensor lora_b, double scaling, OptionalTensor bias,
                    OptionalTensor gates, bool x_grouped, bool y_grouped) {
  const Checker check("scatter_lora");
  CheckedRouting index = check.routing(sorted_scattered_idxs, expert_offsets, top_k);
  Routing& r = index.routing;
  check.x(x, r, x_grouped);
  check.floating("x", x);
  check.weight(weight, "x", x, r);
  check.columns("x", x, "K", weight.size(2), "weight");
  check.lora(lora_a, lora_b, "x", x, r.experts, weight.size(1), weight.size(2));
  check.finite("scaling", scaling);
  check.bias(bias, "x", x, r.experts, weight.size(1));
  check.gates(gates, "x", x, r, y_grouped);
  check.contents(r);

  Tensor y = new_tensor(x, {gates ? r.tokens() : r.slots, weight.size(1)}, x.scalar_type());
  std::vector<double> by_slot;
  const RowOrder order = gates ? RowOrder::token : y_grouped ? RowOrder::grouped : RowOrder::scattered;
  forward(kernels_for(dtype_of(x), batch_invariant()),
          {.routing = r,
           .x = {matrix_of(x), x_grouped ? RowOrder::grouped : RowOrder::token},
           .weight = {experts_of(weight)},
           .lora = lora_of(lora_a, lora_b, scaling),
           .bias = matrix_of(bias),
           .gates = gates_of(gates, by_slot),
           .y = y.mutable_data_ptr(),
           .y_order = order},
          runtime());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("scatter_lora", TORCH_BOX(&scatter_lora)); }

}  // namespace moelora::ops
