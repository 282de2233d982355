// The contraction behind forward, dX and the rank-sized products: every expert's rows times that expert's matrix.
#pragma once

#include "core/weights.h"
#include "dispatch/table.h"
#include "driver/runtime.h"

namespace moelora {

// row(position) = x[position] · W[e]ᵀ + u[position] · B[e]ᵀ,   position in grouped order, e its expert
//
// out_order grouped or scattered: out[that row] = factor · (row + bias[e])
// out_order token:                out[t] = Σ of factor · (row + bias[e]) over the token's slots, experts ascending,
//                                 whatever the size of the problem
// factor = scale · gates[slot]
struct GroupedLinear {
  const Routing* routing;
  RowsIn x;   // [.., depth]
  Weights w;  // [E, outputs, depth]

  Matrix u;   // [S, rank], grouped order, or no data
  Experts b;  // [E, outputs, rank]

  Matrix bias;                    // [E, outputs] or no data
  const double* gates = nullptr;  // [S] by slot
  double scale = 1.0;

  void* out;  // [.., outputs], contiguous
  DType out_dtype;
  RowOrder out_order;

  // ⟨row, dot⟩ (before gate, scale and bias) in parts: dot_parts[part][slot], parts = dot_part_count().
  const RowsIn* dot = nullptr;  // [.., outputs]
  double* dot_parts = nullptr;
};

// Parts depend on shapes and kernels only, never on the number of threads: their sum is reproducible.
int64_t dot_part_count(const KernelChoice& choice, const GroupedLinear& op);

void run_grouped_linear(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime);

// u[position] = factor · x[position] · A[e]ᵀ, A: [E, rank, depth]
struct Projection {
  const Routing* routing;
  RowsIn x;
  Experts a;
  const double* gates = nullptr;
  double scale = 1.0;
  DType u_dtype;  // the compute type, or the accumulators'
};
// u: [S, rank] in grouped order, in `arena`.
Matrix run_projection(const KernelChoice& choice, const Projection& op, Arena& arena, const Runtime& runtime);

}  // namespace moelora
