// Plain strided weights in the storage types: rows serve in place where they can, else a tile is unpacked.
#pragma once

#include "core/arena.h"
#include "core/views.h"
#include "ukernel/ukernel.h"

namespace moelora {

// Whether rows of `m` can be a tile's L operand as they stand.
inline bool rows_in_place(const Kernels& k, const Matrix& m) {
  return m.dtype == k.compute && (m.col_stride == 1 || m.cols <= 1);
}

// Pointers to columns [first, first + n) of `count` rows starting at `pointers`' current rows, in the compute type.
// rows[i] holds the address of the row's column 0 and is replaced; converted copies live in `arena`.
inline void left_rows(const Kernels& k, const Matrix& m, const void** rows, int64_t count, int64_t first, int64_t n,
                      Arena& arena) {
  const int64_t step = size_of(m.dtype) * m.col_stride;
  if (rows_in_place(k, m)) {
    for (int64_t i = 0; i < count; ++i) rows[i] = static_cast<const char*>(rows[i]) + first * step;
    return;
  }
  const int64_t pitch = round_up(n * size_of(k.compute), 64);
  char* copy = static_cast<char*>(arena.take(count * pitch));
  for (int64_t i = 0; i < count; ++i, copy += pitch) {
    k.convert[static_cast<int>(m.dtype)](copy, static_cast<const char*>(rows[i]) + first * step, n, m.col_stride);
    rows[i] = copy;
  }
}

// Bytes of a packed panel of `depth` steps.
inline int64_t panel_bytes(const Kernels& k, int64_t depth, int64_t panel_lanes) {
  return round_up(depth, k.pack) * panel_lanes * size_of(k.compute);
}

// Panel [ceil(depth / pack)][panel_lanes][pack] of rows [lane0, lane0 + lanes) of `m` (they become lanes),
// columns [p0, p0 + depth) (they become p). Any strides.
inline void pack_panel(const Kernels& k, const Matrix& m, int64_t lane0, int64_t lanes, int64_t p0, int64_t depth,
                       void* panel, int64_t panel_lanes, Arena& arena) {
  Arena::Scope scope(arena);
  const int t = static_cast<int>(m.dtype);
  const auto size = [](int64_t stride) { return stride < 0 ? -stride : stride; };
  const bool along_depth = m.col_stride == 1 || (m.row_stride != 1 && size(m.col_stride) < size(m.row_stride));
  const int64_t count = along_depth ? lanes : depth;
  const void** rows = arena.take_array<const void*>(count);
  if (along_depth) {
    for (int64_t i = 0; i < lanes; ++i) rows[i] = m.at(lane0 + i, p0);
    k.pack_lanes[t]({rows, lanes, 0, depth, m.col_stride, panel, panel_lanes});
  } else {
    for (int64_t i = 0; i < depth; ++i) rows[i] = m.at(lane0, p0 + i);
    k.pack_depth[t]({rows, depth, 0, lanes, m.row_stride, panel, panel_lanes});
  }
}

}  // namespace moelora
