#include "ops/checks.h"

namespace moelora::ops {
namespace {

Tensor scatter_lora(Tensor x, Tensor weight, Tensor sorted_scattered_idxs, Tensor expert_offsets, int64_t top_k,
                    OptionalTensor lora_a, OptionalTensor lora_b, double scaling, OptionalTensor bias,
                    OptionalTensor gates, bool x_grouped, bool y_grouped, OptionalTensor weight_scale,
                    OptionalTensor weight_scale2, OptionalTensor weight_zero, std::string weight_format,
                    bool weight_transposed, bool sum_fp32) {
  const Checker check("scatter_lora");
  CheckedRouting index = check.routing(sorted_scattered_idxs, expert_offsets, top_k);
  Routing& r = index.routing;
  check.x(x, r, x_grouped);
  check.floating("x", x);
  const Weights w =
      check.weight({weight, weight_scale, weight_scale2, weight_zero, weight_format, weight_transposed}, "x", x, r);
  check.columns("x", x, "K", w.cols(), "weight");
  check.lora(lora_a, lora_b, "x", x, r.experts, w.rows(), w.cols());
  check.finite("scaling", scaling);
  check.bias(bias, "x", x, r.experts, w.rows());
  check.gates(gates, "x", x, r, y_grouped);
  check.contents(r);

  const DType y_dtype = gates && sum_fp32 ? sum_type(x) : dtype_of(x);
  Tensor y = new_tensor(x, {gates ? r.tokens() : r.slots, w.rows()}, scalar_type(y_dtype));
  std::vector<double> by_slot;
  const RowOrder order = gates ? RowOrder::token : y_grouped ? RowOrder::grouped : RowOrder::scattered;
  forward(kernels_for(dtype_of(x), batch_invariant()),
          {.routing = r,
           .x = {matrix_of(x), x_grouped ? RowOrder::grouped : RowOrder::token},
           .weight = w,
           .lora = lora_of(lora_a, lora_b, scaling),
           .bias = matrix_of(bias),
           .gates = gates_of(gates, by_slot),
           .y = y.mutable_data_ptr(),
           .y_dtype = y_dtype,
           .y_order = order},
          runtime());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("scatter_lora", TORCH_BOX(&scatter_lora)); }

}  // namespace moelora::ops
