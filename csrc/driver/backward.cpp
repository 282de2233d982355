#include "driver/gradients.h"

namespace moelora {

void input_and_lora_gradient(const KernelChoice& choice, const InputGradient& dx, const LoraGradient& dab,
                             const Runtime& runtime) {
  Arena& arena = runtime.arena();
  Arena::Scope scope(arena);
  const RankFactors factors = rank_factors(choice, dx.routing, dx.dy, dx.lora, dab.gates != nullptr, arena, runtime);
  input_gradient(choice, dx, factors, runtime);
  lora_gradient(choice, dab, factors, runtime);
}

}  // namespace moelora
