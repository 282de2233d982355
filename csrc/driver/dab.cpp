#include "driver/block.h"
#include "driver/gradients.h"
#include "driver/lora_pack.h"
#include "driver/outer.h"

namespace moelora {

RankFactors rank_factors(const KernelChoice& choice, const Routing& routing, const RowsIn& dy, const Lora& lora,
                         bool gates_follow, Arena& arena, const Runtime& runtime) {
  const Kernels& k = *choice.kernels;
  const Experts a = compact_lora(choice, lora.a, routing, arena, runtime);
  const Experts b = compact_lora(choice, lora.b, routing, arena, runtime);
  const Projection project{.routing = &routing,
                           .x = dy,
                           .a = b.transposed(),
                           .scale = lora.scaling,
                           .u_dtype = gates_follow ? accumulator_type(k) : k.compute};
  return {a, b, run_projection(choice, project, arena, runtime)};
}

// dA = Vᵀ · x, V = gate · v;   dB = dyᵀ · U, U = scaling · gate · x · Aᵀ
void lora_gradient(const KernelChoice& choice, const LoraGradient& op, const RankFactors& factors,
                   const Runtime& runtime) {
  Arena& arena = runtime.arena();
  Arena::Scope scope(arena);
  const Routing& routing = op.routing;
  run_grouped_outer(choice,
                    {.routing = &routing,
                     .left = {factors.v, RowOrder::grouped},
                     .right = op.x,
                     .gates = op.gates,
                     .out = op.da,
                     .out_dtype = op.lora.a.dtype},
                    runtime);
  const Projection project{.routing = &routing,
                           .x = op.x,
                           .a = factors.a,
                           .gates = op.gates,
                           .scale = op.lora.scaling,
                           .u_dtype = choice.kernels->compute};
  run_grouped_outer(choice,
                    {.routing = &routing,
                     .left = {run_projection(choice, project, arena, runtime), RowOrder::grouped},
                     .right = op.dy,
                     .out = op.db,
                     .out_dtype = op.lora.b.dtype,
                     .layout = op.db_experts_last ? GroupedOuter::Layout::jie : GroupedOuter::Layout::eji},
                    runtime);
}

void lora_gradient(const KernelChoice& choice, const LoraGradient& op, const Runtime& runtime) {
  Arena& arena = runtime.arena();
  Arena::Scope scope(arena);
  lora_gradient(choice, op, rank_factors(choice, op.routing, op.dy, op.lora, op.gates != nullptr, arena, runtime),
                runtime);
}

}  // namespace moelora
