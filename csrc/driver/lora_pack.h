// LoRA parameters as the kernels want them: compute type, unit stride along the columns.
#pragma once

#include "core/views.h"
#include "dispatch/table.h"
#include "driver/runtime.h"

namespace moelora {

// `src` itself where it already is so; else a compact copy [E, rows, cols] in `arena` of the experts that have rows.
// Rank-sized, unlike the weights, which are never copied.
Experts compact_lora(const KernelChoice& choice, const Experts& src, const Routing& routing, Arena& arena,
                     const Runtime& runtime);

}  // namespace moelora
