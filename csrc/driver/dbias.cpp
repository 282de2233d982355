#include <cstring>

#include "driver/block.h"
#include "driver/drivers.h"

namespace moelora {

// Sums of up to kRun rows first, then their sum: rounding stays at the level of short sums.
void bias_gradient(const KernelChoice& choice, const BiasGradient& op, const Runtime& runtime) {
  constexpr int64_t kRun = 128, kColumns = 512;
  const Kernels& k = *choice.kernels;
  const Routing& routing = op.routing;
  const Matrix& dy = op.dy.matrix;
  const int64_t acc = accumulator_size(k), pieces = ceil_div(dy.cols, kColumns);
  for_each_task(runtime, routing.experts * pieces, [&](int64_t task, Arena& arena) {
    const int64_t e = task / pieces, first = task % pieces * kColumns, n = min64(kColumns, dy.cols - first);
    char* total = static_cast<char*>(arena.take(n * acc));
    char* run = static_cast<char*>(arena.take(n * acc));
    std::memset(total, 0, static_cast<size_t>(n * acc));
    for (int64_t begin = routing.begin(e); begin < routing.end(e); begin += kRun) {
      std::memset(run, 0, static_cast<size_t>(n * acc));
      for (int64_t position = begin; position < min64(begin + kRun, routing.end(e)); ++position) {
        const double gate = op.gates ? op.gates[routing.sorted_scattered_idxs[position]] : 1.0;
        k.add_row[static_cast<int>(dy.dtype)](run, dy.at(routing.row(op.dy.order, position), first), dy.col_stride,
                                              gate, n);
      }
      k.add(total, run, nullptr, 1.0, n);
    }
    k.store[static_cast<int>(dy.dtype)](static_cast<char*>(op.dbias) + (e * dy.cols + first) * size_of(dy.dtype), total,
                                        nullptr, 1.0, n);
  });
}

}  // namespace moelora
