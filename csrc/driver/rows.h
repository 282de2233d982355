// Rows of x, or of dy, as operands of a block.
#pragma once

#include "driver/block.h"
#include "driver/strided.h"

namespace moelora {

// Some rows of one expert packed as lanes.
struct LanePanel {
  int64_t first, rows;  // within the block
  int64_t lanes;
  char* x;  // [depth/pack][lanes][pack]
  char* u;  // [rank/pack][lanes][pack]
};

// Panels of nearly equal numbers of vectors.
inline int64_t panel_count(const Kernels& k, int64_t rows) { return ceil_div(rows, k.lanes * k.vecs); }
LanePanel* pack_rows(const Kernels& k, const GroupedLinear& op, const BlockRange& range, Arena& arena);

// Steps [p, p + steps) of the expert's x rows as L rows: in place where they are evenly spaced.
LeftRows x_rows(const Kernels& k, const GroupedLinear& op, const BlockRange& range, int64_t p, int64_t steps,
                Arena& arena);
inline LeftRows x_rows(const Kernels& k, const GroupedLinear& op, const BlockRange& range, Arena& arena) {
  return x_rows(k, op, range, 0, op.w.cols(), arena);
}

}  // namespace moelora
