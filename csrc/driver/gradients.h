// dX and dA/dB from a common factor: v = scaling · dy · B, [S, rank] in grouped order, without gates.
#pragma once

#include "driver/drivers.h"
#include "driver/grouped.h"

namespace moelora {

// What dX and dA/dB both take of LoRA, and v.
struct RankFactors {
  Experts a, b;  // as compact_lora gives them
  Matrix v;
};
// In `arena`. v waits in the accumulators' type where gates are yet to be applied, so that it is rounded once.
RankFactors rank_factors(const KernelChoice& choice, const Routing& routing, const RowsIn& dy, const Lora& lora,
                         bool gates_follow, Arena& arena, const Runtime& runtime);

void input_gradient(const KernelChoice& choice, const InputGradient& op, const RankFactors& factors,
                    const Runtime& runtime);
void lora_gradient(const KernelChoice& choice, const LoraGradient& op, const RankFactors& factors,
                   const Runtime& runtime);

}  // namespace moelora
