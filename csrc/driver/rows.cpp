#include "driver/rows.h"

namespace moelora {

const void** row_addresses(const Routing& routing, const RowsIn& in, int64_t row0, int64_t count, Arena& arena) {
  const void** rows = arena.take_array<const void*>(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = in.matrix.at(routing.row(in.order, row0 + i), 0);
  return rows;
}

LanePanel* pack_rows(const Kernels& k, const GroupedLinear& op, const BlockRange& range, Arena& arena) {
  const int64_t rows = range.row1 - range.row0, rank = op.u.data ? op.b.cols : 0;
  const int64_t count = panel_count(k, rows), vectors = ceil_div(rows, k.lanes);
  LanePanel* panels = arena.take_array<LanePanel>(count);
  const void** x = row_addresses(*op.routing, op.x, range.row0, rows, arena);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t v0 = j * vectors / count, v1 = (j + 1) * vectors / count;
    LanePanel& panel = panels[j];
    panel.first = v0 * k.lanes;
    panel.rows = min64(v1 * k.lanes, rows) - panel.first;
    panel.lanes = round_up(panel.rows, k.lane_step());
    panel.x = static_cast<char*>(arena.take(panel_bytes(k, op.w.cols(), panel.lanes)));
    panel.u = static_cast<char*>(arena.take(panel_bytes(k, rank, panel.lanes)));
    run_pack_lanes(k, op.x.matrix.dtype,
                   {x + panel.first, panel.rows, 0, op.w.cols(), op.x.matrix.col_stride, panel.x, panel.lanes});
    if (rank) pack_panel(k, op.u, range.row0 + panel.first, panel.rows, 0, rank, panel.u, panel.lanes, arena);
  }
  return panels;
}

LeftRows x_rows(const Kernels& k, const GroupedLinear& op, const BlockRange& range, int64_t p, int64_t steps,
                Arena& arena) {
  const int64_t rows = range.row1 - range.row0;
  if (op.x.order == RowOrder::grouped) return left_rows(k, op.x.matrix, range.row0, rows, p, steps, arena);
  return copied_rows(k, op.x.matrix, row_addresses(*op.routing, op.x, range.row0, rows, arena), rows, p, steps, arena);
}

}  // namespace moelora
