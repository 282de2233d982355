// Strided matrices as operands of the micro-kernels: in place where they can be, else copied, converted or packed.
#pragma once

#include <cstring>

#include "core/arena.h"
#include "core/views.h"
#include "ukernel/contract.h"

namespace moelora {

// Whether rows of `m` can be a tile's L operand as they stand.
inline bool rows_in_place(const Kernels& k, const Matrix& m) {
  return m.dtype == k.compute && (m.col_stride == 1 || m.cols <= 1);
}

// Rows of a tile's L operand.
struct LeftRows {
  const char* data;
  int64_t stride;  // bytes

  const void* at(int64_t row, int64_t column_bytes) const { return data + row * stride + column_bytes; }
};

// Row pitch of copies: whole cache lines, and an odd number of them, so that rows do not share cache sets.
inline int64_t copy_pitch(const Kernels& k, int64_t columns) {
  const int64_t lines = ceil_div(columns * size_of(k.compute), 64);
  return (lines | 1) * 64;
}

// Copies columns [first, first + n) of rows starting at rows[i] (addresses of column 0) in the compute type.
inline LeftRows copied_rows(const Kernels& k, const Matrix& m, const void* const* rows, int64_t count, int64_t first,
                            int64_t n, Arena& arena) {
  const int64_t pitch = copy_pitch(k, n), step = size_of(m.dtype) * m.col_stride;
  char* copy = static_cast<char*>(arena.take(count * pitch));
  for (int64_t i = 0; i < count; ++i) {
    const char* row = static_cast<const char*>(rows[i]) + first * step;
    if (rows_in_place(k, m))
      std::memcpy(copy + i * pitch, row, static_cast<size_t>(n * size_of(k.compute)));
    else
      k.convert[static_cast<int>(m.dtype)](copy + i * pitch, row, n, m.col_stride);
  }
  return {copy, pitch};
}

// Rows [row0, row0 + count) of `m`, columns [first, first + n): in place where possible.
inline LeftRows left_rows(const Kernels& k, const Matrix& m, int64_t row0, int64_t count, int64_t first, int64_t n,
                          Arena& arena) {
  if (rows_in_place(k, m)) return {m.at(row0, first), m.row_stride * size_of(m.dtype)};
  const void** rows = arena.take_array<const void*>(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = m.at(row0 + i, 0);
  return copied_rows(k, m, rows, count, first, n, arena);
}

// Bytes of a packed panel of `depth` steps.
inline int64_t panel_bytes(const Kernels& k, int64_t depth, int64_t panel_lanes) {
  return round_up(depth, k.pack) * panel_lanes * size_of(k.compute);
}

// Panels [ceil(depth / pack)][panel_lanes][pack], `apart` bytes from one to the next, of rows [lane0, lane0 + lanes) of
// `m` (they become lanes), columns [p0, p0 + depth) (they become p). Any strides.
inline void pack_panels(const Kernels& k, const Matrix& m, int64_t lane0, int64_t lanes, int64_t p0, int64_t depth,
                        void* panels, int64_t panel_lanes, int64_t apart, Arena& arena) {
  Arena::Scope scope(arena);
  const auto size = [](int64_t stride) { return stride < 0 ? -stride : stride; };
  const bool along_depth = m.col_stride == 1 || (m.row_stride != 1 && size(m.col_stride) < size(m.row_stride));
  const int64_t count = along_depth ? lanes : depth;
  const void** rows = arena.take_array<const void*>(count);
  if (along_depth) {
    for (int64_t i = 0; i < lanes; ++i) rows[i] = m.at(lane0 + i, p0);
    auto* panel = static_cast<char*>(panels);
    for (int64_t lane = 0; lane < lanes; lane += panel_lanes, panel += apart)
      run_pack_lanes(k, m.dtype,
                     {rows + lane, min64(panel_lanes, lanes - lane), 0, depth, m.col_stride, panel, panel_lanes});
  } else {
    for (int64_t i = 0; i < depth; ++i) rows[i] = m.at(lane0, p0 + i);
    run_pack_depth(k, m.dtype, {rows, depth, 0, lanes, m.row_stride, panels, panel_lanes, apart});
  }
}

// One such panel.
inline void pack_panel(const Kernels& k, const Matrix& m, int64_t lane0, int64_t lanes, int64_t p0, int64_t depth,
                       void* panel, int64_t panel_lanes, Arena& arena) {
  pack_panels(k, m, lane0, lanes, p0, depth, panel, panel_lanes, 0, arena);
}

}  // namespace moelora
