#include <vector>

#include "driver/drivers.h"

namespace moelora {

void flatten_sort_count(const void* expert_idxs, bool is_int64, int64_t stride_token, int64_t stride_k, int64_t tokens,
                        int64_t top_k, int64_t experts, int64_t* sorted_scattered_idxs, int32_t* expert_offsets) {
  const auto bin = [&](int64_t slot) {
    const int64_t at = slot / top_k * stride_token + slot % top_k * stride_k;
    const int64_t e =
        is_int64 ? static_cast<const int64_t*>(expert_idxs)[at] : int64_t{static_cast<const int32_t*>(expert_idxs)[at]};
    return e >= 0 && e < experts ? e : experts;
  };
  const int64_t slots = tokens * top_k;
  std::vector<int64_t> next(static_cast<size_t>(experts) + 2, 0);
  for (int64_t slot = 0; slot < slots; ++slot) ++next[static_cast<size_t>(bin(slot)) + 1];
  for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
  for (int64_t e = 0; e < experts; ++e) expert_offsets[e] = static_cast<int32_t>(next[static_cast<size_t>(e) + 1]);
  for (int64_t slot = 0; slot < slots; ++slot) sorted_scattered_idxs[next[static_cast<size_t>(bin(slot))]++] = slot;
}

void read_gates(const Matrix& gates, double* by_slot) {
  for (int64_t t = 0; t < gates.rows; ++t)
    for (int64_t j = 0; j < gates.cols; ++j) {
      const char* at = gates.at(t, j);
      double& to = by_slot[t * gates.cols + j];
      switch (gates.dtype) {
        case DType::bf16: to = to_float(*reinterpret_cast<const bf16_t*>(at)); break;
        case DType::f16: to = to_float(*reinterpret_cast<const f16_t*>(at)); break;
        case DType::f32: to = *reinterpret_cast<const float*>(at); break;
        case DType::f64: to = *reinterpret_cast<const double*>(at); break;
      }
    }
}

IndexCheck check_contents(Routing& routing) {
  int32_t previous = 0;
  for (int64_t e = 0; e < routing.experts; ++e) {
    const int32_t v = routing.expert_offsets[e];
    if (v < 0 || v > routing.slots) return {IndexFault::offset_range, v, previous, e};
    if (v < previous) return {IndexFault::offset_order, v, previous, e};
    previous = v;
  }
  std::vector<bool> seen(static_cast<size_t>(routing.slots), false);
  for (int64_t i = 0; i < routing.slots; ++i) {
    const int64_t slot = routing.sorted_scattered_idxs[i];
    if (slot < 0 || slot >= routing.slots) return {IndexFault::slot_range, slot, 0, i};
    if (seen[static_cast<size_t>(slot)]) return {IndexFault::slot_twice, slot, 0, i};
    seen[static_cast<size_t>(slot)] = true;
  }
  routing.stable = true;
  for (int64_t e = 0; e < routing.experts; ++e)
    for (int64_t i = routing.begin(e) + 1; i < routing.end(e); ++i)
      routing.stable &= routing.sorted_scattered_idxs[i - 1] < routing.sorted_scattered_idxs[i];
  return {};
}

}  // namespace moelora
