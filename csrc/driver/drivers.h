// The operators over plain memory: what ops/ and the tests call. Shapes and meanings as in the operator schemas.
#pragma once

#include "core/weights.h"
#include "dispatch/table.h"
#include "driver/runtime.h"

namespace moelora {

// Stable counting sort of expert ids. idxs: [S] int32 or int64; ids outside [0, experts) come last.
void flatten_sort_count(const void* expert_idxs, bool is_int64, int64_t stride_token, int64_t stride_k, int64_t tokens,
                        int64_t top_k, int64_t experts, int64_t* sorted_scattered_idxs, int32_t* expert_offsets);

// gates: [T, top_k] of any storage type -> [S] by slot
void read_gates(const Matrix& gates, double* by_slot);

// What is wrong with the contents of the index tensors, if anything; fills routing.stable.
enum class IndexFault { none, offset_range, offset_order, slot_range, slot_twice };
struct IndexCheck {
  IndexFault fault = IndexFault::none;
  int64_t value = 0, previous = 0, position = 0;
};
IndexCheck check_contents(Routing& routing);

struct Lora {
  Experts a;  // [E, R, K]
  Experts b;  // [E, N, R]
  double scaling = 1.0;
  bool present() const { return a.data != nullptr; }
};

struct Forward {
  Routing routing;
  RowsIn x;  // grouped or token
  Weights weight;
  Lora lora;
  Matrix bias;          // [E, N] or no data
  const double* gates;  // [S] by slot, or null
  void* y;
  DType y_dtype;     // storage type of x, or the accumulators'
  RowOrder y_order;  // token where gates are given
};
void forward(const KernelChoice& choice, const Forward& op, const Runtime& runtime);

struct InputGradient {
  Routing routing;
  RowsIn dy;  // grouped, scattered, or token where gates are given
  Weights weight;
  Lora lora;
  Matrix bias;
  const double* gates;
  RowsIn x;  // no data: no gate gradient
  void* dx;
  DType dx_dtype;  // storage type of dy, or the accumulators'
  RowOrder dx_order;
  void* dgates;  // [S] fp32, or fp64 for fp64; null: not wanted
};
void input_gradient(const KernelChoice& choice, const InputGradient& op, const Runtime& runtime);

struct LoraGradient {
  Routing routing;
  RowsIn dy, x;
  Lora lora;
  const double* gates;
  void *da, *db;  // [E, R, K]; [E, N, R], or [N, R, E] if db_experts_last; contiguous, storage type of lora
  bool db_experts_last = false;
};
void lora_gradient(const KernelChoice& choice, const LoraGradient& op, const Runtime& runtime);

// Both at once, for one routing, dy and LoRA: dy · B is computed once.
void input_and_lora_gradient(const KernelChoice& choice, const InputGradient& dx, const LoraGradient& dab,
                             const Runtime& runtime);

struct WeightGradient {
  Routing routing;
  RowsIn dy, x;
  const double* gates;
  void* dw;  // [E, N, K], contiguous, storage type of x
};
void weight_gradient(const KernelChoice& choice, const WeightGradient& op, const Runtime& runtime);

struct BiasGradient {
  Routing routing;
  RowsIn dy;
  const double* gates;
  void* dbias;  // [E, N], contiguous, storage type of dy
};
void bias_gradient(const KernelChoice& choice, const BiasGradient& op, const Runtime& runtime);

// h: [rows, 2 · width], y: [rows, width] contiguous, both of h's storage type.
void glu(const KernelChoice& choice, const Matrix& h, const GluArgs& args, void* y, const Runtime& runtime);
// dy: [rows, width], dh: [rows, 2 · width] contiguous.
void glu_backward(const KernelChoice& choice, const Matrix& dy, const Matrix& h, const GluArgs& args, void* dh,
                  const Runtime& runtime);

}  // namespace moelora
