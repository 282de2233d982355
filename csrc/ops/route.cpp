#include <limits>

#include "ops/checks.h"

namespace moelora::ops {
namespace {

// The running counts and the sort's own take 12 bytes an expert: a number that nobody meant would end the process.
constexpr int64_t most_experts = int64_t{1} << 24;

std::tuple<Tensor, Tensor> flatten_sort_count(Tensor expert_idxs, int64_t num_experts) {
  const Checker check("flatten_sort_count");
  check.require(expert_idxs.dim() == 2,
                [&] { return "expert_idxs must be a 2-D tensor [T, top_k], got shape " + shape_text(expert_idxs); });
  check.integer("expert_idxs", expert_idxs);
  check.require(expert_idxs.size(1) >= 1,
                [&] { return "expert_idxs must have at least 1 column, got shape " + shape_text(expert_idxs); });
  check.require(expert_idxs.numel() <= std::numeric_limits<int32_t>::max(), [&] {
    return "expert_idxs must have at most 2147483647 elements, got " + std::to_string(expert_idxs.numel());
  });
  check.require(num_experts >= 1, [&] { return "num_experts must be at least 1, got " + std::to_string(num_experts); });
  check.require(num_experts <= most_experts, [&] {
    return "num_experts must be at most " + std::to_string(most_experts) + ", got " + std::to_string(num_experts);
  });

  Tensor slots = new_tensor(expert_idxs, {expert_idxs.numel()}, ScalarType::Long);
  Tensor offsets = new_tensor(expert_idxs, {num_experts}, ScalarType::Int);
  moelora::flatten_sort_count(expert_idxs.const_data_ptr(), expert_idxs.scalar_type() == ScalarType::Long,
                              expert_idxs.stride(0), expert_idxs.stride(1), expert_idxs.size(0), expert_idxs.size(1),
                              num_experts, static_cast<int64_t*>(slots.mutable_data_ptr()),
                              static_cast<int32_t*>(offsets.mutable_data_ptr()));
  return {slots, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("flatten_sort_count", TORCH_BOX(&flatten_sort_count)); }

}  // namespace moelora::ops
