// The contraction behind dA, dB and dW: for every expert the sum of outer products of its rows.
#pragma once

#include "core/views.h"
#include "dispatch/table.h"
#include "driver/runtime.h"

namespace moelora {

// out[e][i][j] = Σ gates[slot] · left[row][i] · right[row][j] over the expert's rows, in grouped order.
struct GroupedOuter {
  const Routing* routing;
  RowsIn left;                    // [.., I]
  RowsIn right;                   // [.., J]
  const double* gates = nullptr;  // [S] by slot
  void* out;                      // contiguous, in this order:
  DType out_dtype;
  enum class Layout : uint8_t { eij, eji, jie } layout = Layout::eij;
};

void run_grouped_outer(const KernelChoice& choice, const GroupedOuter& op, const Runtime& runtime);

}  // namespace moelora
