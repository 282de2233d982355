#include <cstring>

#include "driver/block.h"
#include "driver/gradients.h"

namespace moelora {
namespace {

// dgates[slot] = Σ parts + ⟨dy, bias⟩. Parts are added in order.
void sum_gate_gradient(const KernelChoice& choice, const InputGradient& op, const double* parts, int64_t part_count,
                       const Runtime& runtime) {
  const Routing& routing = op.routing;
  const Kernels& k = *choice.kernels;
  const int64_t acc = accumulator_size(k), outputs = op.bias.cols;
  const auto put = [&](int64_t slot, double value) {
    if (acc == 8)
      static_cast<double*>(op.dgates)[slot] = value;
    else
      static_cast<float*>(op.dgates)[slot] = static_cast<float>(value);
  };
  for (int64_t position = routing.routed(); position < routing.slots; ++position)
    put(routing.sorted_scattered_idxs[position], 0.0);
  for_each_task(runtime, routing.experts, [&](int64_t e, Arena& arena) {
    char* bias = nullptr;
    if (op.bias.data) {
      bias = static_cast<char*>(arena.take(outputs * acc));
      std::memset(bias, 0, static_cast<size_t>(outputs * acc));
      k.add_row[static_cast<int>(op.bias.dtype)](bias, op.bias.at(e, 0), op.bias.col_stride, 1.0, outputs);
    }
    for (int64_t position = routing.begin(e); position < routing.end(e); ++position) {
      const int64_t slot = routing.sorted_scattered_idxs[position];
      double total = 0;
      for (int64_t part = 0; part < part_count; ++part) total += parts[part * routing.slots + slot];
      const Matrix& dy = op.dy.matrix;
      if (bias)
        total += k.dot[static_cast<int>(dy.dtype)](bias, dy.at(routing.row(op.dy.order, position), 0), dy.col_stride,
                                                   outputs);
      put(slot, total);
    }
  });
}

}  // namespace

// dx = dy · W + (scaling · dy · B) · A: the forward contraction with W, A, B transposed and A, B exchanged.
void input_gradient(const KernelChoice& choice, const InputGradient& op, const RankFactors& factors,
                    const Runtime& runtime) {
  Arena& arena = runtime.arena();
  Arena::Scope scope(arena);
  GroupedLinear linear{.routing = &op.routing,
                       .x = op.dy,
                       .w = op.weight.transposed(),
                       .u = factors.v,
                       .b = factors.a.transposed(),
                       .bias = {},
                       .gates = op.gates,
                       .out = op.dx,
                       .out_dtype = op.dx_dtype,
                       .out_order = op.dx_order};
  double* parts = nullptr;
  const int64_t part_count = op.dgates ? dot_part_count(choice, linear) : 0;
  if (op.dgates) {
    parts = arena.take_array<double>(part_count * op.routing.slots);
    linear.dot = &op.x;
    linear.dot_parts = parts;
  }
  run_grouped_linear(choice, linear, runtime);
  if (op.dgates) sum_gate_gradient(choice, op, parts, part_count, runtime);
}

void input_gradient(const KernelChoice& choice, const InputGradient& op, const Runtime& runtime) {
  Arena& arena = runtime.arena();
  Arena::Scope scope(arena);
  RankFactors factors;
  if (op.lora.present()) factors = rank_factors(choice, op.routing, op.dy, op.lora, false, arena, runtime);
  input_gradient(choice, op, factors, runtime);
}

}  // namespace moelora
