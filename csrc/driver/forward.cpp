#include "driver/drivers.h"
#include "driver/grouped.h"

namespace moelora {

// y = x · Wᵀ + (scaling · x · Aᵀ) · Bᵀ + bias
void forward(const KernelChoice& choice, const Forward& op, const Runtime& runtime) {
  Arena& arena = runtime.arena();
  Arena::Scope scope(arena);
  GroupedLinear linear{.routing = &op.routing, .x = op.x, .w = op.weight, .u = nullptr, .b = {}, .bias = op.bias,
                       .gates = op.gates, .out = op.y, .out_dtype = op.x.matrix.dtype, .out_order = op.y_order};
  if (op.lora.present()) {
    void* u = arena.take(op.routing.slots * op.lora.a.rows * size_of(choice.kernels->compute));
    run_projection(choice, {.routing = &op.routing, .x = op.x, .a = op.lora.a, .scale = op.lora.scaling}, u, runtime);
    linear.u = u;
    linear.b = op.lora.b;
  }
  run_grouped_linear(choice, linear, runtime);
}

}  // namespace moelora
