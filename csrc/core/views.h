// Plain views of tensors. Strides count elements and may be anything.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace moelora {

// [rows, cols]
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;

  const char* at(int64_t r, int64_t c) const {
    return static_cast<const char*>(data) + (r * row_stride + c * col_stride) * size_of(dtype);
  }
  Matrix transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
};

// [experts, rows, cols]
struct Experts {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t experts = 0, rows = 0, cols = 0;
  int64_t expert_stride = 0, row_stride = 0, col_stride = 0;

  Matrix operator[](int64_t e) const {
    return {
        static_cast<const char*>(data) + e * expert_stride * size_of(dtype), dtype, rows, cols, row_stride, col_stride};
  }
  Experts transposed() const { return {data, dtype, experts, cols, rows, expert_stride, col_stride, row_stride}; }
};

// Which row of a tensor belongs to a position of the grouped order.
enum class RowOrder : uint8_t {
  grouped,    // the position itself
  scattered,  // its slot
  token,      // its slot / top_k
};

// Where every row goes: E experts, S slots, slot = token · top_k + j.
struct Routing {
  const int64_t* sorted_scattered_idxs = nullptr;  // [S] position -> slot
  const int32_t* expert_offsets = nullptr;         // [E] inclusive running count
  int64_t experts = 0, slots = 0, top_k = 1;
  bool stable = true;  // slots ascend within every expert

  int64_t tokens() const { return slots / top_k; }
  int64_t begin(int64_t e) const { return e == 0 ? 0 : expert_offsets[e - 1]; }
  int64_t end(int64_t e) const { return expert_offsets[e]; }
  int64_t routed() const { return experts == 0 ? 0 : expert_offsets[experts - 1]; }
  int64_t row(RowOrder order, int64_t position) const {
    if (order == RowOrder::grouped) return position;
    int64_t slot = sorted_scattered_idxs[position];
    return order == RowOrder::scattered ? slot : slot / top_k;
  }
};

// A tensor of rows together with its order.
struct RowsIn {
  Matrix matrix;
  RowOrder order = RowOrder::grouped;
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace moelora
