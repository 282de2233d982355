#include "driver/drivers.h"
#include "driver/grouped.h"
#include "driver/lora_pack.h"
#include "driver/outer.h"

namespace moelora {
namespace {

// Rank-sized rows as an operand: [S, R] in the compute type, grouped order.
RowsIn rank_rows(const KernelChoice& choice, const Routing& routing, const void* data, int64_t rank) {
  return {{data, choice.kernels->compute, routing.slots, rank, rank, 1}, RowOrder::grouped};
}

}  // namespace

// dA = Vᵀ · x, V = scaling · gate · dy · B;   dB = dyᵀ · U, U = scaling · gate · x · Aᵀ
void lora_gradient(const KernelChoice& choice, const LoraGradient& op, const Runtime& runtime) {
  Arena& arena = runtime.arena();
  Arena::Scope scope(arena);
  const Routing& routing = op.routing;
  const int64_t rank = op.lora.a.rows;
  void* rank_space = arena.take(routing.slots * rank * size_of(choice.kernels->compute));
  const Experts a = compact_lora(choice, op.lora.a, routing, arena, runtime);
  const Experts b = compact_lora(choice, op.lora.b, routing, arena, runtime);
  const auto project = [&](const RowsIn& rows, const Experts& to_rank) {
    run_projection(choice, {.routing = &routing, .x = rows, .a = to_rank, .gates = op.gates, .scale = op.lora.scaling},
                   rank_space, runtime);
    return rank_rows(choice, routing, rank_space, rank);
  };
  run_grouped_outer(choice,
                    {.routing = &routing,
                     .left = project(op.dy, b.transposed()),
                     .right = op.x,
                     .out = op.da,
                     .out_dtype = op.lora.a.dtype},
                    runtime);
  run_grouped_outer(choice,
                    {.routing = &routing,
                     .left = project(op.x, a),
                     .right = op.dy,
                     .out = op.db,
                     .out_dtype = op.lora.b.dtype,
                     .layout = op.db_experts_last ? GroupedOuter::Layout::jie : GroupedOuter::Layout::eji},
                    runtime);
}

}  // namespace moelora
