#include "ops/gradients.h"

namespace moelora::ops {
namespace {

// PEFT's B: [N, R, E] in memory, seen as [E, N, R].
bool experts_last(const Tensor& lora_b) {
  const int64_t experts = lora_b.size(0), rank = lora_b.size(2);
  return lora_b.stride(0) == 1 && lora_b.stride(2) == experts && lora_b.stride(1) == rank * experts;
}

}  // namespace

InputGradientResult new_input_gradient(const GradientArgs& args, const Weights& weight, const Lora& lora,
                                       const OptionalTensor& bias, const OptionalTensor& x, bool with_dgates) {
  const Routing& r = args.routing;
  const Tensor& dy = args.dy;
  const ScalarType gate_type = dy.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const DType dx_dtype = args.sum_fp32 && !args.x_grouped ? sum_type(dy) : dtype_of(dy);
  Tensor dx = new_tensor(dy, {args.x_grouped ? r.slots : r.tokens(), weight.cols()}, scalar_type(dx_dtype));
  Tensor dgates = with_dgates ? new_tensor(dy, {r.tokens(), r.top_k}, gate_type) : new_tensor(dy, {0}, gate_type);
  const RowOrder x_order = order_of_x(args.x_grouped);
  const InputGradient op{.routing = r,
                         .dy = args.dy_rows(),
                         .weight = weight,
                         .lora = lora,
                         .bias = matrix_of(bias),
                         .gates = args.gates,
                         .x = {matrix_of(x), x_order},
                         .dx = dx.mutable_data_ptr(),
                         .dx_dtype = dx_dtype,
                         .dx_order = x_order,
                         .dgates = with_dgates ? dgates.mutable_data_ptr() : nullptr};
  return {dx, dgates, op};
}

LoraGradientResult new_lora_gradient(const GradientArgs& args, const Tensor& x, const Tensor& lora_a,
                                     const Tensor& lora_b, double scaling) {
  const int64_t experts = lora_b.size(0), n = lora_b.size(1), rank = lora_b.size(2);
  Tensor da = new_tensor(args.dy, {experts, rank, lora_a.size(2)}, lora_a.scalar_type());
  const bool last = experts_last(lora_b);
  Tensor db = last ? new_tensor(args.dy, {n, rank, experts}, lora_b.scalar_type())
                   : new_tensor(args.dy, {experts, n, rank}, lora_b.scalar_type());
  const LoraGradient op{.routing = args.routing,
                        .dy = args.dy_rows(),
                        .x = {matrix_of(x), order_of_x(args.x_grouped)},
                        .lora = lora_of(lora_a, lora_b, scaling),
                        .gates = args.gates,
                        .da = da.mutable_data_ptr(),
                        .db = db.mutable_data_ptr(),
                        .db_experts_last = last};
  using torch::stable::transpose;
  return {da, last ? transpose(transpose(db, 0, 2), 1, 2) : db, op};
}

}  // namespace moelora::ops
