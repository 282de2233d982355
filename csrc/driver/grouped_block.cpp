#include "driver/grouped_block.h"

#include <cstring>

#include "formats/dense.h"

namespace moelora {
namespace {

// What happens to a row of accumulators once the contraction is done.
class Epilogue {
 public:
  Epilogue(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range, const TokenSums* sums,
           Arena& arena)
      : k_(*choice.kernels), op_(op), sums_(sums), segment_(segment_width(choice, op)) {
    if (op.bias.data == nullptr) return;
    const int64_t n = range.out1 - range.out0;
    const int64_t bytes = n * accumulator_size(k_);
    char* bias = static_cast<char*>(arena.take(bytes));
    std::memset(bias, 0, static_cast<size_t>(bytes));
    k_.add_row[static_cast<int>(op.bias.dtype)](bias, op.bias.at(range.expert, range.out0), op.bias.col_stride, 1.0,
                                                n);
    bias_ = bias;
    bias_out0_ = range.out0;
  }

  // c: [width] accumulators of the row at `position`, outputs [out0, out0 + width)
  void operator()(int64_t position, const void* c, int64_t out0, int64_t width) const {
    const Routing& routing = *op_.routing;
    const int64_t slot = routing.sorted_scattered_idxs[position];
    const double factor = op_.gates ? op_.scale * op_.gates[slot] : op_.scale;
    const int64_t acc = accumulator_size(k_);
    const char* bias = bias_ ? bias_ + (out0 - bias_out0_) * acc : nullptr;
    if (op_.dot) {
      const Matrix& m = op_.dot->matrix;
      op_.dot_parts[out0 / segment_ * routing.slots + slot] = k_.dot[static_cast<int>(m.dtype)](
          c, m.at(routing.row(op_.dot->order, position), out0), m.col_stride, width);
    }
    if (sums_) {
      const int64_t token = slot / routing.top_k - sums_->token0;
      k_.add(sums_->sums + (token * sums_->width + out0 - sums_->out0) * acc, c, bias, factor, width);
    } else {
      const int64_t row = routing.row(op_.out_order, position);
      char* out = static_cast<char*>(op_.out) + (row * op_.w.rows + out0) * size_of(op_.out_dtype);
      k_.store[static_cast<int>(op_.out_dtype)](out, c, bias, factor, width);
    }
  }

 private:
  const Kernels& k_;
  const GroupedLinear& op_;
  const TokenSums* sums_;
  const int64_t segment_;
  const char* bias_ = nullptr;
  int64_t bias_out0_ = 0;
};

const void** row_addresses(const Routing& routing, const RowsIn& in, int64_t row0, int64_t count, Arena& arena) {
  const void** rows = arena.take_array<const void*>(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = in.matrix.at(routing.row(in.order, row0 + i), 0);
  return rows;
}

const void** u_addresses(const Kernels& k, const GroupedLinear& op, int64_t row0, int64_t count, Arena& arena) {
  const void** rows = arena.take_array<const void*>(count);
  const int64_t pitch = op.b.cols * size_of(k.compute);
  for (int64_t i = 0; i < count; ++i) rows[i] = static_cast<const char*>(op.u) + (row0 + i) * pitch;
  return rows;
}

// Rows of one expert packed as lanes: panels of `lanes` rows.
struct LanePanels {
  int64_t lanes, count;
  char* x;  // [count][depth][lanes]
  char* u;  // [count][rank][lanes]
  int64_t x_bytes, u_bytes;

  int64_t rows_in(int64_t panel, int64_t rows) const { return min64(lanes, rows - panel * lanes); }
};

LanePanels pack_rows(const Kernels& k, const GroupedLinear& op, const BlockRange& range, Arena& arena) {
  const int64_t rows = range.row1 - range.row0, rank = op.u ? op.b.cols : 0;
  LanePanels panels;
  panels.lanes = k.lanes * k.vecs;
  panels.count = ceil_div(rows, panels.lanes);
  panels.x_bytes = panel_bytes(k, op.w.cols, panels.lanes);
  panels.u_bytes = panel_bytes(k, rank, panels.lanes);
  panels.x = static_cast<char*>(arena.take(panels.count * panels.x_bytes));
  panels.u = static_cast<char*>(arena.take(panels.count * panels.u_bytes));
  const void** x = row_addresses(*op.routing, op.x, range.row0, rows, arena);
  const void** u = rank ? u_addresses(k, op, range.row0, rows, arena) : nullptr;
  for (int64_t j = 0; j < panels.count; ++j) {
    const int64_t here = panels.rows_in(j, rows), first = j * panels.lanes;
    const int64_t lanes = round_up(here, k.lanes);
    k.pack_lanes[static_cast<int>(op.x.matrix.dtype)]({x + first, here, 0, op.w.cols, op.x.matrix.col_stride,
                                                       panels.x + j * panels.x_bytes, lanes});
    if (rank)
      k.pack_lanes[static_cast<int>(k.compute)](
          {u + first, here, 0, rank, 1, panels.u + j * panels.u_bytes, lanes});
  }
  return panels;
}

// Addresses of rows [first, first + count) of `m`, columns [col0, col0 + cols), as L rows.
void weight_rows(const Kernels& k, const Matrix& m, int64_t first, int64_t count, int64_t col0, int64_t cols,
                 const void** rows, Arena& arena) {
  for (int64_t i = 0; i < count; ++i) rows[i] = m.at(first + i, 0);
  left_rows(k, m, rows, count, col0, cols, arena);
}

}  // namespace

bool uses_row_orientation(const GroupedLinear& op) { return op.w.col_stride == 1 || op.w.cols == 1; }

int64_t segment_width(const KernelChoice& choice, const GroupedLinear& op) {
  return uses_row_orientation(op) ? choice.blocking.segment : choice.kernels->lanes * choice.kernels->vecs;
}

// W[e]: [outputs, depth] rows in place.  x packed: [depth/pack][lanes][pack].  C: [segment][lanes], then transposed.
void row_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                           const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Kernels& k = *choice.kernels;
  const Epilogue epilogue(choice, op, range, sums, arena);
  const int64_t rows = range.row1 - range.row0, depth = op.w.cols, rank = op.u ? op.b.cols : 0;
  const int64_t acc = accumulator_size(k), segment = choice.blocking.segment;
  const LanePanels panels = pack_rows(k, op, range, arena);
  const int64_t c_bytes = segment * panels.lanes * acc;
  char* c = static_cast<char*>(arena.take(panels.count * c_bytes));
  char* by_row = static_cast<char*>(arena.take(c_bytes));
  const Matrix w = op.w[range.expert], b = op.u ? op.b[range.expert] : Matrix{};

  for (int64_t out = range.out0; out < range.out1; out += segment) {
    const int64_t width = min64(segment, range.out1 - out);
    for (int64_t p = 0; p < depth; p += choice.blocking.depth) {
      const int64_t steps = min64(choice.blocking.depth, depth - p);
      const bool last = p + steps == depth;
      for (int64_t i = 0; i < width; i += k.rows) {
        Arena::Scope tile_scope(arena);
        const int64_t tile_rows = min64(k.rows, width - i);
        const void *w_rows[kMaxTileRows], *b_rows[kMaxTileRows];
        weight_rows(k, w, out + i, tile_rows, p, steps, w_rows, arena);
        if (rank && last) weight_rows(k, b, out + i, tile_rows, 0, rank, b_rows, arena);
        for (int64_t j = 0; j < panels.count; ++j) {
          const int64_t lanes = round_up(panels.rows_in(j, rows), k.lanes);
          const char* x_panel = panels.x + j * panels.x_bytes + p * lanes * size_of(k.compute);
          TileArgs args{{{w_rows, x_panel, steps}, {b_rows, panels.u + j * panels.u_bytes, rank}},
                        rank && last ? 2 : 1,
                        lanes,
                        c + j * c_bytes + i * panels.lanes * acc,
                        panels.lanes,
                        p > 0};
          k.tile[tile_rows - 1][lanes / k.lanes - 1](args);
        }
      }
    }
    for (int64_t j = 0; j < panels.count; ++j) {
      const int64_t here = panels.rows_in(j, rows);
      k.transpose(by_row, segment, c + j * c_bytes, panels.lanes, width, here);
      for (int64_t i = 0; i < here; ++i)
        epilogue(range.row0 + j * panels.lanes + i, by_row + i * segment * acc, out, width);
    }
  }
}

// x: rows in place.  W[e] packed: [depth/pack][lanes][pack], lanes are outputs.  C: [rows][lanes].
void panel_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                             const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Kernels& k = *choice.kernels;
  const Epilogue epilogue(choice, op, range, sums, arena);
  const int64_t rows = range.row1 - range.row0, depth = op.w.cols, rank = op.u ? op.b.cols : 0;
  const int64_t acc = accumulator_size(k), widest = k.lanes * k.vecs;
  const int64_t pass = min64(choice.blocking.depth, depth), size = size_of(k.compute);
  const void** x = row_addresses(*op.routing, op.x, range.row0, rows, arena);
  left_rows(k, op.x.matrix, x, rows, 0, depth, arena);
  const void** x_pass = arena.take_array<const void*>(rows);
  const void** u = rank ? u_addresses(k, op, range.row0, rows, arena) : nullptr;
  char* w_panel = static_cast<char*>(arena.take(panel_bytes(k, pass, widest)));
  char* b_panel = static_cast<char*>(arena.take(panel_bytes(k, rank, widest)));
  char* c = static_cast<char*>(arena.take(rows * widest * acc));
  const Matrix w = op.w[range.expert], b = op.u ? op.b[range.expert] : Matrix{};
  const int64_t tiles = ceil_div(rows, k.rows);

  for (int64_t out = range.out0; out < range.out1; out += widest) {
    const int64_t width = min64(widest, range.out1 - out), lanes = round_up(width, k.lanes);
    if (rank) pack_panel(k, b, out, width, 0, rank, b_panel, lanes, arena);
    for (int64_t p = 0; p < depth; p += pass) {
      const int64_t steps = min64(pass, depth - p);
      const bool last = p + steps == depth;
      pack_panel(k, w, out, width, p, steps, w_panel, lanes, arena);
      for (int64_t i = 0; i < rows; ++i) x_pass[i] = static_cast<const char*>(x[i]) + p * size;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = t * rows / tiles, tile_rows = (t + 1) * rows / tiles - first;
        TileArgs args{{{x_pass + first, w_panel, steps}, {u + first, b_panel, rank}},
                      rank && last ? 2 : 1,
                      lanes,
                      c + first * widest * acc,
                      widest,
                      p > 0};
        k.tile[tile_rows - 1][lanes / k.lanes - 1](args);
      }
    }
    for (int64_t i = 0; i < rows; ++i) epilogue(range.row0 + i, c + i * widest * acc, out, width);
  }
}

}  // namespace moelora
