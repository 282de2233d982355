#include "driver/drivers.h"
#include "driver/grouped.h"
#include "driver/lora_pack.h"

namespace moelora {

// y = x · Wᵀ + (scaling · x · Aᵀ) · Bᵀ + bias
void forward(const KernelChoice& choice, const Forward& op, const Runtime& runtime) {
  Arena& arena = runtime.arena();
  Arena::Scope scope(arena);
  GroupedLinear linear{.routing = &op.routing,
                       .x = op.x,
                       .w = op.weight,
                       .u = {},
                       .b = {},
                       .bias = op.bias,
                       .gates = op.gates,
                       .out = op.y,
                       .out_dtype = op.y_dtype,
                       .out_order = op.y_order};
  if (op.lora.present()) {
    const Experts a = compact_lora(choice, op.lora.a, op.routing, arena, runtime);
    const Projection project{
        .routing = &op.routing, .x = op.x, .a = a, .scale = op.lora.scaling, .u_dtype = choice.kernels->compute};
    linear.u = run_projection(choice, project, arena, runtime);
    linear.b = compact_lora(choice, op.lora.b, op.routing, arena, runtime);
  }
  run_grouped_linear(choice, linear, runtime);
}

}  // namespace moelora
