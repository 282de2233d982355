#include "driver/grouped_block.h"

#include <cstring>

#include "formats/dense.h"

namespace moelora {
namespace {

void prefetch(const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
  asm volatile("");  // gcc drops calls of functions that only prefetch: they have no effect that it knows of
}

// What happens to rows of accumulators once the contraction is done.
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
    k_.add_row[static_cast<int>(op.bias.dtype)](bias, op.bias.at(range.expert, range.out0), op.bias.col_stride, 1.0, n);
    bias_ = bias;
    bias_out0_ = range.out0;
  }

  // Before the contraction of rows from `position` on, outputs [out0, out0 + width).
  void expect(int64_t position, int64_t rows, int64_t out0, int64_t width) const {
    for (int64_t i = 0; i < min64(rows, kRowsAhead); ++i) fetch(position + i, out0, width);
  }

  // c: [rows] of accumulators, `pitch` bytes apart, of outputs [out0, out0 + width).
  void operator()(int64_t position, int64_t rows, const char* c, int64_t pitch, int64_t out0, int64_t width) const {
    for (int64_t i = 0; i < rows; ++i) {
      if (i + kRowsAhead < rows) fetch(position + i + kRowsAhead, out0, width);
      finish(position + i, c + i * pitch, out0, width);
    }
  }

 private:
  static constexpr int64_t kRowsAhead = 12;

  char* sum_of(int64_t slot, int64_t out0) const {
    const int64_t token = slot / op_.routing->top_k - sums_->token0;
    return sums_->sums + (token * sums_->width + out0 - sums_->out0) * accumulator_size(k_);
  }

  // Sums and the rows of `dot` lie anywhere, and are too many for L2.
  void fetch(int64_t position, int64_t out0, int64_t width) const {
    const Routing& routing = *op_.routing;
    if (sums_) prefetch(sum_of(routing.sorted_scattered_idxs[position], out0), width * accumulator_size(k_));
    if (op_.dot == nullptr || op_.dot->matrix.col_stride != 1) return;
    const Matrix& m = op_.dot->matrix;
    prefetch(m.at(routing.row(op_.dot->order, position), out0), width * size_of(m.dtype));
  }

  void finish(int64_t position, const char* c, int64_t out0, int64_t width) const {
    const Routing& routing = *op_.routing;
    const int64_t slot = routing.sorted_scattered_idxs[position];
    const double factor = op_.gates ? op_.scale * op_.gates[slot] : op_.scale;
    const char* bias = bias_ ? bias_ + (out0 - bias_out0_) * accumulator_size(k_) : nullptr;
    if (op_.dot) {
      const Matrix& m = op_.dot->matrix;
      op_.dot_parts[out0 / segment_ * routing.slots + slot] =
          k_.dot[static_cast<int>(m.dtype)](c, m.at(routing.row(op_.dot->order, position), out0), m.col_stride, width);
    }
    if (sums_) {
      k_.add(sum_of(slot, out0), c, bias, factor, width);
    } else {
      const int64_t row = routing.row(op_.out_order, position);
      char* out = static_cast<char*>(op_.out) + (row * op_.w.rows + out0) * size_of(op_.out_dtype);
      k_.store[static_cast<int>(op_.out_dtype)](out, c, bias, factor, width);
    }
  }

  const Kernels& k_;
  const GroupedLinear& op_;
  const TokenSums* sums_;
  const int64_t segment_;
  const char* bias_ = nullptr;
  int64_t bias_out0_ = 0;
};

// Some rows of one expert packed as lanes.
struct LanePanel {
  int64_t first, rows;  // within the block
  int64_t lanes;
  char* x;  // [depth/pack][lanes][pack]
  char* u;  // [rank/pack][lanes][pack]
};

// Panels of nearly equal numbers of vectors.
int64_t panel_count(const Kernels& k, int64_t rows) { return ceil_div(rows, k.lanes * k.vecs); }

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
    panel.x = static_cast<char*>(arena.take(panel_bytes(k, op.w.cols, panel.lanes)));
    panel.u = static_cast<char*>(arena.take(panel_bytes(k, rank, panel.lanes)));
    k.pack_lanes[static_cast<int>(op.x.matrix.dtype)](
        {x + panel.first, panel.rows, 0, op.w.cols, op.x.matrix.col_stride, panel.x, panel.lanes});
    if (rank) pack_panel(k, op.u, range.row0 + panel.first, panel.rows, 0, rank, panel.u, panel.lanes, arena);
  }
  return panels;
}

// What a tile of weight rows [first, first + rows) fetches while it is at work: as many rows behind it.
Ahead next_rows(const Matrix& w, int64_t first, int64_t rows, int64_t p, int64_t steps) {
  const int64_t next = first + rows, size = size_of(w.dtype);
  if (next >= w.rows || w.col_stride != 1) return {};
  return {w.at(next, p), w.row_stride * size, min64(rows, w.rows - next), steps * size};
}

// c: [width][ldc] (+)= weight rows [out, out + width) · panel, steps [p, p + steps); LoRA joins the last pass.
// fetch: these weight rows are new to the caches.
void multiply_panel(const Kernels& k, const Matrix& w, const Matrix& b, const LanePanel& panel, int64_t out,
                    int64_t width, int64_t p, int64_t steps, bool fetch, char* c, int64_t ldc, Arena& arena) {
  const int vecs = k.vectors(panel.lanes), tallest = k.max_rows[vecs - 1];
  const bool with_lora = b.data && p + steps == w.cols;
  for (int64_t i = 0; i < width; i += tallest) {
    Arena::Scope scope(arena);
    const int64_t rows = min64(tallest, width - i);
    const LeftRows w_rows = left_rows(k, w, out + i, rows, p, steps, arena);
    const LeftRows b_rows = with_lora ? left_rows(k, b, out + i, rows, 0, b.cols, arena) : LeftRows{};
    const Segment base{w_rows.data, w_rows.stride, panel.x + p * panel.lanes * size_of(k.compute), steps};
    const Segment lora{b_rows.data, b_rows.stride, panel.u, b.cols};
    const Ahead ahead = fetch ? next_rows(w, out + i, rows, p, steps) : Ahead{};
    k.tile({{base, lora},
            with_lora ? 2 : 1,
            static_cast<int>(rows),
            vecs,
            k.ends_in_half(panel.lanes),
            panel.lanes,
            c + i * ldc * accumulator_size(k),
            ldc,
            p > 0,
            ahead});
  }
}

// The expert's x rows as L rows: in place where they are evenly spaced.
LeftRows x_rows(const Kernels& k, const GroupedLinear& op, const BlockRange& range, Arena& arena) {
  const int64_t rows = range.row1 - range.row0, depth = op.w.cols;
  if (op.x.order == RowOrder::grouped) return left_rows(k, op.x.matrix, range.row0, rows, 0, depth, arena);
  return copied_rows(k, op.x.matrix, row_addresses(*op.routing, op.x, range.row0, rows, arena), rows, 0, depth, arena);
}

// Rows and weight rows both as they are. For few rows.
class DotRows {
 public:
  DotRows(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range, Arena& arena)
      : choice_(choice),
        w_(op.w[range.expert]),
        b_(op.u.data ? op.b[range.expert] : Matrix{}),
        rows_(range.row1 - range.row0),
        groups_(ceil_div(rows_, kMaxDotCols)) {
    const Kernels& k = *choice.kernels;
    x_ = x_rows(k, op, range, arena);
    if (b_.data) u_ = left_rows(k, op.u, range.row0, rows_, 0, b_.cols, arena);
    if (rows_) height_ = k.dot_rows[ceil_div(rows_, groups_) - 1];
  }

  // c: [rows][ldc] = outputs [out, out + width).  fetch: these weight rows are new to the caches.
  void operator()(int64_t out, int64_t width, bool fetch, char* c, int64_t ldc, Arena& arena) const {
    for (int64_t p = 0; p < w_.cols; p += choice_.blocking.depth)
      for (int64_t i = 0; i < width; i += height_)
        tile_row(out + i, min64(height_, width - i), p, fetch, c + i * accumulator_size(*choice_.kernels), ldc, arena);
  }

 private:
  // Weight rows [out, out + height), one pass.
  void tile_row(int64_t out, int64_t height, int64_t p, bool fetch, char* c, int64_t ldc, Arena& arena) const {
    Arena::Scope scope(arena);
    const Kernels& k = *choice_.kernels;
    const int64_t steps = min64(choice_.blocking.depth, w_.cols - p), acc = accumulator_size(k);
    const bool with_lora = b_.data && p + steps == w_.cols;
    const LeftRows w_rows = left_rows(k, w_, out, height, p, steps, arena);
    const LeftRows b_rows = with_lora ? left_rows(k, b_, out, height, 0, b_.cols, arena) : LeftRows{};
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t first = g * rows_ / groups_, cols = (g + 1) * rows_ / groups_ - first;
      const DotSegment base{w_rows.data, w_rows.stride, x_.at(first, p * size_of(k.compute)), x_.stride, steps};
      const DotSegment lora{b_rows.data, b_rows.stride, u_.at(first, 0), u_.stride, b_.cols};
      k.dot_tile({{base, lora},
                  with_lora ? 2 : 1,
                  static_cast<int>(height),
                  static_cast<int>(cols),
                  c + first * ldc * acc,
                  ldc,
                  p > 0,
                  fetch && g == 0 ? next_rows(w_, out, height, p, steps) : Ahead{}});
    }
  }

  const KernelChoice& choice_;
  const Matrix w_, b_;
  const int64_t rows_, groups_;
  int64_t height_ = 1;
  LeftRows x_{}, u_{};
};

// Rows at the end of a block that would be lanes of a vector mostly empty.
int64_t odd_rows(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range) {
  const Kernels& k = *choice.kernels;
  const int64_t odd = (range.row1 - range.row0) % k.lane_step();
  return k.dot_tile && rows_in_place(k, op.w[range.expert]) && odd <= choice.blocking.odd_rows ? odd : 0;
}

// All rows of the block times panels of weights, each packed once. Where the kernels weave, by tiles on the way: those
// of the panel before, or the panel's own first one.
class PanelPass {
 public:
  // Outputs [out, out + width), steps [p0, p1) of the expert's weights. May reach beyond the end.
  struct Part {
    int64_t expert = 0, out = 0, width = 0, p0 = 0, p1 = 0;
  };

  // What a block begins with.
  static Part first_part(const KernelChoice& choice, const GroupedLinear& op, const BlockRange* block) {
    if (block == nullptr) return {};
    const int64_t widest = choice.kernels->lanes * choice.kernels->vecs, outputs = block->out1 - block->out0;
    if (in_thin_passes(choice, *block)) return {block->expert, block->out0, outputs, 0, choice.blocking.thin_depth};
    return {block->expert, block->out0, min64(widest, outputs), 0, min64(choice.blocking.depth, op.w.cols)};
  }

  // For passes of up to `pass` steps.
  PanelPass(const Kernels& k, const GroupedLinear& op, const BlockRange& range, int64_t pass, Arena& arena)
      : k_(k),
        weights_(op.w),
        w_(op.w[range.expert]),
        b_(op.u.data ? op.b[range.expert] : Matrix{}),
        rows_(range.row1 - range.row0) {
    x_ = x_rows(k, op, range, arena);
    if (b_.data) u_ = left_rows(k, op.u, range.row0, rows_, 0, b_.cols, arena);
    for (char*& panel : w_panels_) panel = static_cast<char*>(arena.take(panel_bytes(k, pass, k.lanes * k.vecs)));
    b_panel_ = static_cast<char*>(arena.take(panel_bytes(k, b_.cols, k.lanes * k.vecs)));
  }

  // The i-th of `count` shares of the part's steps.
  Part share(Part part, int64_t i, int64_t count) const {
    const int64_t p1 = min64(part.p1, w_.cols), packs = max64(0, p1 - part.p0) / k_.pack;
    const int64_t first = part.p0 + i * packs / count * k_.pack;
    return {part.expert, part.out, part.width, first, i + 1 < count ? part.p0 + (i + 1) * packs / count * k_.pack : p1};
  }

  // c: [rows][ldc] (+)= rows times the panel `now`; LoRA joins the last pass. `next`, if any, is what the next call is
  // about: it is woven meanwhile, or fetched where that cannot be. After it, or if there is none, `later` is fetched.
  void operator()(Part now, Part next, Part later, char* c, int64_t ldc, Arena& arena) {
    const int64_t lanes = round_up(now.width, k_.lane_step()), steps = now.p1 - now.p0;
    const int64_t tiles = ceil_div(rows_, k_.max_rows[k_.vectors(lanes) - 1]);
    const bool with_lora = b_.data && now.p1 == w_.cols;
    char* panel = w_panels_[current_];
    const bool weave_now = !woven_ && weaves(now);
    if (!woven_ && !weave_now) pack_panel(k_, w_, now.out, now.width, now.p0, steps, panel, lanes, arena);
    if (with_lora) pack_panel(k_, b_, now.out, now.width, 0, b_.cols, b_panel_, lanes, arena);
    const int64_t busy = weave_now, weavers = tiles - busy;
    const bool weave_next = weavers > 0 && lanes == k_.lanes * k_.vecs && weaves(next) &&
                            (next.p1 - next.p0) / k_.pack <= weavers * (steps / k_.pack);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * rows_ / tiles, tile_rows = (t + 1) * rows_ / tiles - row;
      Segment base{x_.at(row, now.p0 * size_of(k_.compute)), x_.stride, panel, steps};
      if (weave_now && t == 0) {
        base.rows = w_.at(now.out, now.p0);
        base.rows_stride = w_.col_stride * size_of(w_.dtype);
        base.panel = tiles > 1 ? panel : nullptr;
      }
      TileArgs tile{{base, {u_.at(row, 0), u_.stride, b_panel_, b_.cols}},
                    with_lora ? 2 : 1,
                    static_cast<int>(tile_rows),
                    k_.vectors(lanes),
                    k_.ends_in_half(lanes),
                    lanes,
                    c + row * ldc * accumulator_size(k_),
                    ldc,
                    now.p0 > 0,
                    {}};
      if (weave_next) {
        const int64_t i = t - busy;
        if (i >= 0) tile.weave = weave(share(next, i, weavers), next.p0, w_panels_[1 - current_]);
        tile.ahead = fetch(i + 1 < weavers ? share(next, i + 1, weavers) : share(later, 0, weavers));
      } else {
        tile.ahead = fetch(share(next.width ? next : later, t, tiles));
      }
      k_.tile(tile);
    }
    woven_ = weave_next;
    if (woven_) current_ = 1 - current_;
  }

 private:
  bool weaves(Part part) const {
    return k_.weaves && w_.dtype == k_.compute && w_.row_stride == 1 && part.width == k_.lanes * k_.vecs &&
           (part.p1 - part.p0) % k_.pack == 0;
  }

  Ahead fetch(Part part) const {
    if (part.out >= w_.rows || part.p0 >= part.p1 || w_.row_stride != 1) return {};
    const int64_t size = size_of(w_.dtype);
    return {weights_[part.expert].at(part.out, part.p0), w_.col_stride * size, part.p1 - part.p0,
            min64(part.width, w_.rows - part.out) * size};
  }

  // p0: where the panel begins
  Weave weave(Part part, int64_t p0, char* panel) const {
    const int64_t size = size_of(w_.dtype);
    return {w_.at(part.out, part.p0), w_.col_stride * size, panel + (part.p0 - p0) * part.width * size,
            part.p1 - part.p0};
  }

  const Kernels& k_;
  const Experts& weights_;
  const Matrix w_, b_;
  const int64_t rows_;
  LeftRows x_{}, u_{};
  char *w_panels_[2], *b_panel_;
  int current_ = 0;
  bool woven_ = false;  // by the tiles of the call before
};

}  // namespace

const void** row_addresses(const Routing& routing, const RowsIn& in, int64_t row0, int64_t count, Arena& arena) {
  const void** rows = arena.take_array<const void*>(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = in.matrix.at(routing.row(in.order, row0 + i), 0);
  return rows;
}

bool in_thin_passes(const KernelChoice& choice, const BlockRange& block) {
  return block.row1 - block.row0 <= choice.blocking.thin_rows;
}

bool uses_row_orientation(const GroupedLinear& op) { return op.w.col_stride == 1 || op.w.cols == 1; }

int64_t segment_width(const KernelChoice& choice, const GroupedLinear& op) {
  return uses_row_orientation(op) ? choice.blocking.segment : choice.kernels->lanes * choice.kernels->vecs;
}

// W[e]: [outputs, depth] rows in place.  x packed: [depth/pack][lanes][pack].  C: [segment][lanes], then transposed.
// Some of the last rows are not packed.
void row_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                           const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Kernels& k = *choice.kernels;
  const Epilogue epilogue(choice, op, range, sums, arena);
  const int64_t depth = op.w.cols, acc = accumulator_size(k), segment = choice.blocking.segment;
  const int64_t widest = k.lanes * k.vecs, odd = odd_rows(choice, op, range);
  BlockRange even = range, rest = range;
  even.row1 = rest.row0 = range.row1 - odd;
  const int64_t count = panel_count(k, even.row1 - even.row0);
  const LanePanel* panels = pack_rows(k, op, even, arena);
  const DotRows dots(choice, op, rest, arena);
  char* c = static_cast<char*>(arena.take(segment * widest * acc));
  char* by_row = static_cast<char*>(arena.take(segment * widest * acc));
  const Matrix w = op.w[range.expert], b = op.u.data ? op.b[range.expert] : Matrix{};

  for (int64_t out = range.out0; out < range.out1; out += segment) {
    const int64_t width = min64(segment, range.out1 - out);
    for (const LanePanel* panel = panels; panel < panels + count; ++panel) {
      const int64_t position = range.row0 + panel->first;
      epilogue.expect(position, panel->rows, out, width);
      for (int64_t p = 0; p < depth; p += choice.blocking.depth)
        multiply_panel(k, w, b, *panel, out, width, p, min64(choice.blocking.depth, depth - p), panel == panels, c,
                       widest, arena);
      k.transpose(by_row, segment, c, widest, width, panel->rows);
      epilogue(position, panel->rows, by_row, segment * acc, out, width);
    }
    if (odd == 0) continue;
    epilogue.expect(rest.row0, odd, out, width);
    dots(out, width, count == 0, by_row, segment, arena);
    epilogue(rest.row0, odd, by_row, segment * acc, out, width);
  }
}

// W[e]: [outputs, depth] and x: [rows, depth], rows in place.  C: [rows][segment].
void dot_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                           const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Epilogue epilogue(choice, op, range, sums, arena);
  const int64_t rows = range.row1 - range.row0, segment = choice.blocking.segment;
  const int64_t acc = accumulator_size(*choice.kernels);
  const DotRows dots(choice, op, range, arena);
  char* c = static_cast<char*>(arena.take(rows * segment * acc));
  for (int64_t out = range.out0; out < range.out1; out += segment) {
    const int64_t width = min64(segment, range.out1 - out);
    dots(out, width, true, c, segment, arena);
    epilogue(range.row0, rows, c, segment * acc, out, width);
  }
}

// x: rows in place.  W[e] packed: [depth/pack][lanes][pack], lanes are outputs.  C: [rows][lanes].
void panel_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                             const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Kernels& k = *choice.kernels;
  const Epilogue epilogue(choice, op, range, sums, arena);
  const int64_t rows = range.row1 - range.row0, depth = op.w.cols, widest = k.lanes * k.vecs;
  const int64_t pass = max64(1, min64(choice.blocking.depth, depth));
  PanelPass panel(k, op, range, pass, arena);
  char* c = static_cast<char*>(arena.take(rows * widest * accumulator_size(k)));
  const int64_t passes = max64(1, ceil_div(depth, pass)), parts = ceil_div(range.out1 - range.out0, widest) * passes;
  const auto part = [&](int64_t i) -> PanelPass::Part {
    if (i >= parts) return i == parts ? PanelPass::first_part(choice, op, range.next) : PanelPass::Part{};
    const int64_t out = range.out0 + i / passes * widest, p = i % passes * pass;
    return {range.expert, out, min64(widest, range.out1 - out), p, min64(depth, p + pass)};
  };
  for (int64_t i = 0; i < parts; ++i) {
    const PanelPass::Part now = part(i);
    if (now.p0 == 0) epilogue.expect(range.row0, rows, now.out, now.width);
    const bool last = i + 1 == parts;
    panel(now, last ? PanelPass::Part{} : part(i + 1), part(last ? i + 1 : i + 2), c, widest, arena);
    if (now.p1 == depth) epilogue(range.row0, rows, c, widest * accumulator_size(k), now.out, now.width);
  }
}

// The same for few rows, where memory is the limit: short passes over all outputs read the weights from end to end.
// C: [rows][outputs].
void thin_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                            const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Kernels& k = *choice.kernels;
  const Epilogue epilogue(choice, op, range, sums, arena);
  const int64_t rows = range.row1 - range.row0, depth = op.w.cols, widest = k.lanes * k.vecs;
  const int64_t all = range.out1 - range.out0, panels = ceil_div(all, widest), ldc = round_up(all, widest);
  const int64_t pass = min64(choice.blocking.thin_depth, depth), acc = accumulator_size(k);
  PanelPass panel(k, op, range, pass, arena);
  char* c = static_cast<char*>(arena.take(rows * ldc * acc));
  for (int64_t p = 0; p < depth; p += pass) {
    const PanelPass::Part next = p + pass < depth
                                     ? PanelPass::Part{range.expert, range.out0, all, p + pass, p + 2 * pass}
                                     : PanelPass::first_part(choice, op, range.next);
    for (int64_t j = 0; j < panels; ++j)
      panel({range.expert, range.out0 + j * widest, min64(widest, all - j * widest), p, min64(p + pass, depth)}, {},
            panel.share(next, j, panels), c + j * widest * acc, ldc, arena);
  }
  for (int64_t j = 0; j < all; j += widest)
    epilogue(range.row0, rows, c + j * acc, ldc * acc, range.out0 + j, min64(widest, all - j));
}

}  // namespace moelora
