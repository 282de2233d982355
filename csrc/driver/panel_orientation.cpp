#include "driver/epilogue.h"
#include "driver/next_region.h"
#include "driver/rows.h"
#include "driver/weight_tiles.h"

namespace moelora {
namespace {

// All rows of the block times panels of weights, each packed once, by tiles on the way: those of the panel before, or
// the panel's own first one.
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
    if (in_thin_passes(choice, *block))
      return {block->expert, block->out0, outputs, 0, min64(choice.blocking.thin_depth, op.w.cols())};
    return {block->expert, block->out0, min64(widest, outputs), 0, min64(choice.blocking.depth, op.w.cols())};
  }

  // For passes of up to `pass` steps.
  PanelPass(const Kernels& k, const GroupedLinear& op, const BlockRange& range, int64_t pass, Arena& arena)
      : k_(k),
        weights_(op.w),
        w_(k, op.w, range.expert),
        b_(k, op.b, range.expert),
        rank_(op.u.data ? b_.depth() : 0),
        rows_(range.row1 - range.row0) {
    x_ = x_rows(k, op, range, arena);
    if (rank_) u_ = left_rows(k, op.u, range.row0, rows_, 0, rank_, arena);
    for (char*& panel : w_panels_) panel = static_cast<char*>(arena.take(panel_bytes(k, pass, k.lanes * k.vecs)));
    b_panel_ = static_cast<char*>(arena.take(panel_bytes(k, rank_, k.lanes * k.vecs)));
  }

  // The i-th of `count` shares of the part's steps.
  Part share(Part part, int64_t i, int64_t count) const {
    const int64_t p1 = min64(part.p1, w_.depth()), packs = max64(0, p1 - part.p0) / k_.pack;
    const int64_t first = part.p0 + i * packs / count * k_.pack;
    return {part.expert, part.out, part.width, first, i + 1 < count ? part.p0 + (i + 1) * packs / count * k_.pack : p1};
  }

  // c: [rows][ldc] (+)= rows times the panel `now`; LoRA joins the last pass. `next`, if any, is what the next call is
  // about: it is woven meanwhile, or fetched where that cannot be. After it, or if there is none, `later` is fetched.
  void operator()(Part now, Part next, Part later, char* c, int64_t ldc, Arena& arena) {
    const int64_t lanes = round_up(now.width, k_.lane_step()), steps = now.p1 - now.p0;
    const int64_t tiles = ceil_div(rows_, k_.max_rows[k_.vectors(lanes) - 1]);
    const bool with_lora = rank_ && now.p1 == w_.depth();
    char* panel = w_panels_[current_];
    const bool weave_now = !woven_ && w_.weaves(now.width, steps);
    if (!woven_ && !weave_now) w_.strip(now.out, now.width, now.p0, steps, panel, lanes, 0, arena);
    if (with_lora) b_.strip(now.out, now.width, 0, rank_, b_panel_, lanes, 0, arena);
    const int64_t busy = weave_now, weavers = tiles - busy;
    const bool weave_next = weavers > 0 && lanes == k_.lanes * k_.vecs && w_.weaves(next.width, next.p1 - next.p0) &&
                            (next.p1 - next.p0) / k_.pack <= weavers * (steps / k_.pack);
    const Ahead ahead = weave_next ? Ahead{} : fetch(next.width ? next : later);
    Shares heights(rows_, tiles), aheads(ahead.rows, tiles);
    for (int64_t t = 0; t < tiles; ++t) {
      const auto [row, tile_rows] = heights.take();
      Segment base{x_.at(row, now.p0 * size_of(k_.compute)), x_.stride, panel, steps};
      if (weave_now && t == 0) {
        const LaneRows rows = w_.lane_rows(now.out, now.p0);
        base.rows = rows.data;
        base.rows_stride = rows.stride;
        base.panel = tiles > 1 ? panel : nullptr;
      }
      TileArgs tile{{base, {u_.at(row, 0), u_.stride, b_panel_, rank_}},
                    with_lora ? 2 : 1,
                    static_cast<int>(tile_rows),
                    k_.vectors(lanes),
                    k_.ends_in_half(lanes),
                    lanes,
                    c + row * ldc * accumulator_size(k_),
                    ldc,
                    now.p0 > 0 ? Start::resume : Start::zero,
                    {}};
      if (weave_next) {
        const int64_t i = t - busy;
        if (i >= 0) tile.weave = weave(share(next, i, weavers), next.p0, w_panels_[1 - current_]);
        tile.ahead = fetch(i + 1 < weavers ? share(next, i + 1, weavers) : share(later, 0, weavers));
      } else {
        tile.ahead = share_of(ahead, aheads.take());
      }
      run_tile(k_, tile);
    }
    woven_ = weave_next;
    if (woven_) current_ = 1 - current_;
  }

 private:
  Ahead fetch(Part part) const {
    if (part.width == 0) return {};
    return WeightTiles(k_, weights_, part.expert).strip_ahead(part.out, part.width, part.p0, part.p1 - part.p0);
  }

  // p0: where the panel begins
  Weave weave(Part part, int64_t p0, char* panel) const {
    const LaneRows rows = w_.lane_rows(part.out, part.p0);
    return {rows.data, rows.stride, panel + (part.p0 - p0) * part.width * size_of(k_.compute), part.p1 - part.p0};
  }

  const Kernels& k_;
  const Weights& weights_;
  const WeightTiles w_, b_;
  const int64_t rank_, rows_;
  LeftRows x_{}, u_{};
  char *w_panels_[2], *b_panel_;
  int current_ = 0;
  bool woven_ = false;  // by the tiles of the call before
};

}  // namespace

// x: rows in place.  W[e] packed: [depth/pack][lanes][pack], lanes are outputs.  C: [rows][lanes].
void panel_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                             const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Kernels& k = *choice.kernels;
  const Epilogue epilogue(choice, op, range, sums, arena);
  const int64_t rows = range.row1 - range.row0, depth = op.w.cols(), widest = k.lanes * k.vecs;
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
  const int64_t rows = range.row1 - range.row0, depth = op.w.cols(), widest = k.lanes * k.vecs;
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
