#include "driver/drivers.h"
#include "driver/outer.h"

namespace moelora {

void weight_gradient(const KernelChoice& choice, const WeightGradient& op, const Runtime& runtime) {
  run_grouped_outer(choice,
                    {.routing = &op.routing,
                     .left = op.dy,
                     .right = op.x,
                     .gates = op.gates,
                     .out = op.dw,
                     .out_dtype = op.x.matrix.dtype},
                    runtime);
}

}  // namespace moelora
