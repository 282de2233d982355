#include "driver/outer.h"

#include <algorithm>
#include <vector>

#include "driver/grouped_block.h"
#include "formats/dense.h"

namespace moelora {
namespace {

struct OuterRange {
  int64_t expert, i0, i1, j0, j1;
};

// Rows [row0, row0 + rows) of `left`, columns [i0, i1), transposed to L rows: [i1 - i0][rows], scaled by the gates.
void pack_left(const Kernels& k, const GroupedOuter& op, const OuterRange& range, int64_t row0, int64_t rows,
               char* left, int64_t pitch, Arena& arena) {
  Arena::Scope scope(arena);
  const Routing& routing = *op.routing;
  const Matrix& m = op.left.matrix;
  const void** from = arena.take_array<const void*>(rows);
  char* factors = op.gates ? static_cast<char*>(arena.take(rows * accumulator_size(k))) : nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    from[r] = m.at(routing.row(op.left.order, row0 + r), 0);
    if (factors == nullptr) continue;
    const double gate = op.gates[routing.sorted_scattered_idxs[row0 + r]];
    if (k.compute == DType::f64)
      reinterpret_cast<double*>(factors)[r] = gate;
    else
      reinterpret_cast<float*>(factors)[r] = static_cast<float>(gate);
  }
  k.transpose_in[static_cast<int>(m.dtype)](
      left, pitch, {from, rows, range.i0, range.i1 - range.i0, m.col_stride, nullptr, 0}, factors);
}

// c: [i1 - i0][pitch] accumulators -> out
void store_block(const Kernels& k, const GroupedOuter& op, const OuterRange& range, const char* c, int64_t pitch,
                 Arena& arena) {
  const int64_t acc = accumulator_size(k), size = size_of(op.out_dtype);
  const int64_t height = range.i1 - range.i0, width = range.j1 - range.j0;
  const int64_t all_i = op.left.matrix.cols, all_j = op.right.matrix.cols;
  char* out = static_cast<char*>(op.out) + range.expert * all_i * all_j * size;
  const auto store = k.store[static_cast<int>(op.out_dtype)];
  if (!op.transposed) {
    for (int64_t i = 0; i < height; ++i)
      store(out + ((range.i0 + i) * all_j + range.j0) * size, c + i * pitch * acc, nullptr, 1.0, width);
    return;
  }
  char* t = static_cast<char*>(arena.take(width * height * acc));
  k.transpose(t, height, c, pitch, height, width);
  if (height == all_i) return store(out + range.j0 * all_i * size, t, nullptr, 1.0, width * height);
  for (int64_t j = 0; j < width; ++j)
    store(out + ((range.j0 + j) * all_i + range.i0) * size, t + j * height * acc, nullptr, 1.0, height);
}

// left packed: [i][rows].  right packed: [rows/pack][lanes][pack], lanes are j.  C: [i][j].
void outer_block(const KernelChoice& choice, const GroupedOuter& op, const OuterRange& range, Arena& arena) {
  const Kernels& k = *choice.kernels;
  const Routing& routing = *op.routing;
  const int64_t acc = accumulator_size(k), widest = k.lanes * k.vecs;
  const int64_t begin = routing.begin(range.expert), end = routing.end(range.expert);
  const int64_t height = range.i1 - range.i0, width = range.j1 - range.j0;
  const int64_t pitch = round_up(width, widest);
  const int64_t pass = min64(choice.blocking.outer_depth, max64(1, end - begin));
  char* c = static_cast<char*>(arena.take(height * pitch * acc));
  std::fill_n(c, begin == end ? height * pitch * acc : 0, char{0});
  char* left = static_cast<char*>(arena.take(height * pass * size_of(k.compute)));
  char* panel = static_cast<char*>(arena.take(panel_bytes(k, pass, widest)));
  const void** from = arena.take_array<const void*>(pass);
  const Matrix& m = op.right.matrix;

  for (int64_t row0 = begin; row0 < end; row0 += pass) {
    const int64_t rows = min64(pass, end - row0);
    pack_left(k, op, range, row0, rows, left, rows, arena);
    for (int64_t r = 0; r < rows; ++r) from[r] = m.at(routing.row(op.right.order, row0 + r), 0);
    for (int64_t j = 0; j < width; j += widest) {
      const int64_t here = min64(widest, width - j), lanes = round_up(here, k.lane_step());
      k.pack_depth[static_cast<int>(m.dtype)]({from, rows, range.j0 + j, here, m.col_stride, panel, lanes});
      const int64_t tallest = k.max_rows[k.vectors(lanes) - 1], l_stride = rows * size_of(k.compute);
      for (int64_t i = 0; i < height; i += tallest) {
        const Segment segment{left + i * l_stride, l_stride, panel, rows};
        k.tile({{segment, {}},
                1,
                static_cast<int>(min64(tallest, height - i)),
                k.vectors(lanes),
                k.ends_in_half(lanes),
                lanes,
                c + (i * pitch + j) * acc,
                pitch,
                row0 > begin,
                {}});
      }
    }
  }
  store_block(k, op, range, c, pitch, arena);
}

}  // namespace

void run_grouped_outer(const KernelChoice& choice, const GroupedOuter& op, const Runtime& runtime) {
  const Blocking& b = choice.blocking;
  const Routing& routing = *op.routing;
  const int64_t all_i = op.left.matrix.cols, all_j = op.right.matrix.cols;
  std::vector<OuterRange> tasks;
  for (int64_t e = 0; e < routing.experts; ++e)
    for (int64_t i = 0; i < all_i; i += b.outer_rows)
      for (int64_t j = 0; j < all_j; j += b.outer_cols)
        tasks.push_back({e, i, min64(i + b.outer_rows, all_i), j, min64(j + b.outer_cols, all_j)});
  const auto rows = [&](const OuterRange& r) { return routing.end(r.expert) - routing.begin(r.expert); };
  std::stable_sort(tasks.begin(), tasks.end(),
                   [&](const OuterRange& a, const OuterRange& c) { return rows(a) > rows(c); });
  for_each_task(runtime, static_cast<int64_t>(tasks.size()),
                [&](int64_t i, Arena& arena) { outer_block(choice, op, tasks[static_cast<size_t>(i)], arena); });
}

}  // namespace moelora
