#include "ops/tensors.h"

namespace moelora::ops {
namespace {

void run(int64_t times, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, times, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context);
  });
}

Arena& thread_arena() {
  static thread_local Arena arena;
  return arena;
}

}  // namespace

const Runtime& runtime() {
  static thread_local Runtime current;
  current = {static_cast<int64_t>(torch::stable::get_num_threads()), run, thread_arena};
  return current;
}

const double* gates_of(const OptionalTensor& gates, std::vector<double>& storage) {
  if (!gates) return nullptr;
  storage.resize(static_cast<size_t>(gates->numel()));
  read_gates(matrix_of(*gates), storage.data());
  return storage.data();
}

}  // namespace moelora::ops
