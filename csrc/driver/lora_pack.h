// LoRA parameters as the drivers want them: unit stride along the columns.
#pragma once

#include "core/views.h"
#include "dispatch/table.h"
#include "driver/runtime.h"

namespace moelora {

// `src` itself where it already is so; else a copy [E, rows, cols] in the compute type, in `arena`, of the experts that
// have rows. Rank-sized; PEFT's B, where neighbours in memory belong to different experts, is the case that matters.
Experts compact_lora(const KernelChoice& choice, const Experts& src, const Routing& routing, Arena& arena,
                     const Runtime& runtime);

}  // namespace moelora
