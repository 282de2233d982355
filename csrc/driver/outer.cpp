#include "driver/outer.h"

#include <algorithm>
#include <vector>

#include "driver/block.h"
#include "driver/next_region.h"
#include "driver/strided.h"

namespace moelora {
namespace {

using Layout = GroupedOuter::Layout;

// Experts [e0, e1): one, or as many as there are lanes where experts are adjacent in the result.
struct OuterRange {
  int64_t e0, e1, i0, i1, j0, j1;

  int64_t height() const { return i1 - i0; }
  int64_t width() const { return j1 - j0; }
};

// Rows [row0, row0 + rows) of `left`, columns [i0, i1), transposed to L rows: [i1 - i0][rows], scaled by the gates.
void pack_left(const Kernels& k, const GroupedOuter& op, const OuterRange& range, int64_t row0, int64_t rows,
               char* left, int64_t pitch, Arena& arena) {
  Arena::Scope scope(arena);
  const Routing& routing = *op.routing;
  const Matrix& m = op.left.matrix;
  const void** from = row_addresses(routing, op.left, row0, rows, arena);
  char* factors = op.gates ? static_cast<char*>(arena.take(rows * accumulator_size(k))) : nullptr;
  for (int64_t r = 0; factors && r < rows; ++r) {
    const double gate = op.gates[routing.sorted_scattered_idxs[row0 + r]];
    if (k.compute == DType::f64)
      reinterpret_cast<double*>(factors)[r] = gate;
    else
      reinterpret_cast<float*>(factors)[r] = static_cast<float>(gate);
  }
  k.transpose_in[static_cast<int>(m.dtype)](
      left, pitch, {from, rows, range.i0, range.i1 - range.i0, m.col_stride, nullptr, 0}, factors);
}

// c: [i][pitch] accumulators of one expert -> out
void store_block(const Kernels& k, const GroupedOuter& op, const OuterRange& range, const char* c, int64_t pitch,
                 Arena& arena) {
  const int64_t acc = accumulator_size(k), size = size_of(op.out_dtype);
  const int64_t height = range.height(), width = range.width();
  const int64_t all_i = op.left.matrix.cols, all_j = op.right.matrix.cols;
  char* out = static_cast<char*>(op.out) + range.e0 * all_i * all_j * size;
  const auto store = k.store[static_cast<int>(op.out_dtype)];
  if (op.layout == Layout::eij) {
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

// c: [expert][i][pitch] accumulators -> out, experts side by side
void store_experts(const Kernels& k, const GroupedOuter& op, const OuterRange& range, const char* c, int64_t pitch,
                   Arena& arena) {
  const int64_t acc = accumulator_size(k), size = size_of(op.out_dtype), count = range.e1 - range.e0;
  const int64_t height = range.height(), width = range.width(), all_i = op.left.matrix.cols;
  char* t = static_cast<char*>(arena.take(width * count * acc));
  for (int64_t i = 0; i < height; ++i) {
    k.transpose(t, count, c + i * pitch * acc, height * pitch, count, width);
    for (int64_t j = 0; j < width; ++j) {
      const int64_t at = ((range.j0 + j) * all_i + range.i0 + i) * op.routing->experts + range.e0;
      k.store[static_cast<int>(op.out_dtype)](static_cast<char*>(op.out) + at * size, t + j * count * acc, nullptr, 1.0,
                                              count);
    }
  }
}

// Columns [first, first + columns) of some rows of `right`, which a panel is soon packed of.
struct PanelSource {
  const void** rows;  // addresses of their column 0
  int64_t count, first, columns;
};

PanelSource panel_source(const GroupedOuter& op, int64_t row0, int64_t count, int64_t first, int64_t columns,
                         Arena& arena) {
  return {row_addresses(*op.routing, op.right, row0, count, arena), count, first, columns};
}

// Panels of `right`, one after the other; what the next one is made of is fetched or converted by the tiles before.
class RightPanels {
 public:
  RightPanels(const Kernels& k, const Matrix& right, int64_t depth, Arena& arena)
      : k_(k), right_(right), widest_(k.lanes * k.vecs) {
    for (char*& panel : panels_) panel = static_cast<char*>(arena.take(panel_bytes(k, depth, widest_)));
  }

  const char* pack(const PanelSource& now, int64_t lanes) {
    if (made_) current_ = !current_;
    if (!made_)
      run_pack_depth(k_, right_.dtype,
                     {now.rows, now.count, now.first, now.columns, right_.col_stride, panels_[current_], lanes});
    made_ = false;
    return panels_[current_];
  }

  // follows: whether `then` is packed next, and not only probable.
  void expect(const PanelSource& then, bool follows, int64_t tiles) {
    then_ = then;
    shares_ = Shares(then.count, tiles);
    made_ = follows && then.count >= kWidenRows && k_.widens && right_.dtype == DType::bf16 && right_.col_stride == 1 &&
            then.columns == widest_;
  }

  void share(TileArgs& tile) {
    const int64_t size = size_of(right_.dtype), to_stride = widest_ * size_of(k_.compute);
    const auto [first, count] = shares_.take();
    if (right_.col_stride != 1) return;
    if (made_)
      tile.widen = {.rows = count,
                    .n = widest_,
                    .runs = then_.rows + first,
                    .offset = then_.first * size,
                    .to = panels_[!current_] + first * to_stride,
                    .to_stride = to_stride,
                    .unit = widest_,
                    .ahead = 2 * widest_ * size};
    else
      tile.ahead = {nullptr, 0, count, then_.columns * size, then_.rows + first, then_.first * size};
  }

 private:
  static constexpr int64_t kWidenRows = 48;  // tiles of fewer steps are too short for it

  const Kernels& k_;
  const Matrix& right_;
  const int64_t widest_;
  char* panels_[2];
  bool current_ = false, made_ = false;
  PanelSource then_{};
  Shares shares_{0, 1};
};

// left packed: [i][rows].  right packed: [rows/pack][lanes][pack], lanes are j.  c: [i][pitch].
// next: what the thread probably works on afterwards.
void sum_outer_products(const KernelChoice& choice, const GroupedOuter& op, const OuterRange& range, int64_t expert,
                        PanelSource next, char* c, int64_t pitch, Arena& arena) {
  Arena::Scope scope(arena);
  const Kernels& k = *choice.kernels;
  const int64_t acc = accumulator_size(k), widest = k.lanes * k.vecs, height = range.height();
  const int64_t begin = op.routing->begin(expert), end = op.routing->end(expert);
  const int64_t pass = min64(choice.blocking.outer_depth, max64(1, end - begin));
  std::fill_n(c, begin == end ? height * pitch * acc : 0, char{0});
  char* left = static_cast<char*>(arena.take(height * pass * size_of(k.compute)));
  RightPanels panels(k, op.right.matrix, pass, arena);
  const auto source = [&](int64_t row0, int64_t j) {
    return panel_source(op, row0, min64(pass, end - row0), j, min64(widest, range.j1 - j), arena);
  };

  for (int64_t row0 = begin; row0 < end; row0 += pass) {
    Arena::Scope pass_scope(arena);
    PanelSource now = source(row0, range.j0);
    pack_left(k, op, range, row0, now.count, left, now.count, arena);
    for (int64_t j = range.j0; j < range.j1; j += widest) {
      const int64_t after = j + widest, lanes = round_up(now.columns, k.lane_step());
      const char* panel = panels.pack(now, lanes);
      const bool more = after < range.j1, follows = more || row0 + pass < end;
      PanelSource then = next;
      if (more)
        then = {now.rows, now.count, after, min64(widest, range.j1 - after)};
      else if (follows)
        then = source(row0 + pass, range.j0);
      const int64_t tallest = k.max_rows[k.vectors(lanes) - 1], tiles = ceil_div(height, tallest);
      const int64_t l_stride = now.count * size_of(k.compute);
      panels.expect(then, follows, tiles);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i = t * tallest;
        TileArgs tile{{{left + i * l_stride, l_stride, panel, now.count}, {}},
                      1,
                      static_cast<int>(min64(tallest, height - i)),
                      k.vectors(lanes),
                      k.ends_in_half(lanes),
                      lanes,
                      c + (i * pitch + j - range.j0) * acc,
                      pitch,
                      choice.blocking.start(row0 - begin),
                      {}};
        panels.share(tile);
        run_tile(k, tile);
      }
      now = then;
    }
  }
}

// next: as above, may be null.
void outer_block(const KernelChoice& choice, const GroupedOuter& op, const OuterRange& range, const OuterRange* next,
                 Arena& arena) {
  const Kernels& k = *choice.kernels;
  const int64_t pitch = round_up(range.width(), k.lanes * k.vecs), block = range.height() * pitch * accumulator_size(k);
  char* c = static_cast<char*>(arena.take((range.e1 - range.e0) * block));
  for (int64_t e = range.e0; e < range.e1; ++e) {
    Arena::Scope scope(arena);
    const OuterRange* after = e + 1 < range.e1 ? &range : next;
    PanelSource first{};
    if (after) {
      const int64_t expert = e + 1 < range.e1 ? e + 1 : after->e0, row0 = op.routing->begin(expert);
      first = panel_source(op, row0, min64(choice.blocking.outer_depth, op.routing->end(expert) - row0), after->j0,
                           min64(k.lanes * k.vecs, after->width()), arena);
    }
    sum_outer_products(choice, op, range, e, first, c + (e - range.e0) * block, pitch, arena);
  }
  if (op.layout == Layout::jie)
    store_experts(k, op, range, c, pitch, arena);
  else
    store_block(k, op, range, c, pitch, arena);
}

}  // namespace

void run_grouped_outer(const KernelChoice& choice, const GroupedOuter& op, const Runtime& runtime) {
  const Blocking& b = choice.blocking;
  const Routing& routing = *op.routing;
  const int64_t all_i = op.left.matrix.cols, all_j = op.right.matrix.cols;
  // Experts side by side fill whole cache lines; the accumulators of all of them wait in L2.
  const bool adjacent = op.layout == Layout::jie;
  const int64_t e_step = adjacent ? choice.kernels->lanes : 1;
  const int64_t j_step = adjacent ? choice.kernels->lanes * choice.kernels->vecs : b.outer_cols;
  std::vector<OuterRange> tasks;
  for (int64_t e = 0; e < routing.experts; e += e_step)
    for (int64_t i = 0; i < all_i; i += b.outer_rows)
      for (int64_t j = 0; j < all_j; j += j_step)
        tasks.push_back(
            {e, min64(e + e_step, routing.experts), i, min64(i + b.outer_rows, all_i), j, min64(j + j_step, all_j)});
  const auto rows = [&](const OuterRange& r) { return routing.end(r.e1 - 1) - routing.begin(r.e0); };
  std::stable_sort(tasks.begin(), tasks.end(),
                   [&](const OuterRange& a, const OuterRange& c) { return rows(a) > rows(c); });
  for_each_task(runtime, static_cast<int64_t>(tasks.size()), [&](int64_t i, Arena& arena) {
    // Threads take tasks in turn.
    const size_t task = static_cast<size_t>(i), after = static_cast<size_t>(i + runtime.threads);
    outer_block(choice, op, tasks[task], after < tasks.size() ? &tasks[after] : nullptr, arena);
  });
}

}  // namespace moelora
