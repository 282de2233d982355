#include "driver/dot_rows.h"
#include "driver/epilogue.h"
#include "driver/next_region.h"
#include "driver/rows.h"

namespace moelora {
namespace {

// Weight rows of one segment, of one pass; LoRA's where it joins that pass.
struct PassRows {
  LeftRows w, b;
  int64_t out, width, p, steps, rank;
  Start start;
};

// The regions of a block in order, and of which one the next block begins with.
class Regions {
 public:
  Regions(const Blocking& blocking, const GroupedLinear& op, const BlockRange& range, int64_t steps)
      : op_(op), range_(range), width_(blocking.segment), steps_(steps) {}

  Region first(const BlockRange& block) const {
    return {block.expert, block.out0, min64(width_, block.out1 - block.out0), 0, min64(steps_, op_.w.cols())};
  }
  Region after(const Region& now) const {
    const int64_t depth = op_.w.cols(), p = now.p + now.steps, out = now.out + now.width;
    if (now.width == 0 || now.expert != range_.expert || now.out < range_.out0 || now.out >= range_.out1) return {};
    if (p < depth) return {now.expert, now.out, now.width, p, min64(steps_, depth - p)};
    if (out < range_.out1) return {now.expert, out, min64(width_, range_.out1 - out), 0, min64(steps_, depth)};
    return range_.next ? first(*range_.next) : Region{};
  }
  bool ends(const Region& now) const { return now.p + now.steps == op_.w.cols() && now.out + now.width == range_.out1; }

 private:
  const GroupedLinear& op_;
  const BlockRange& range_;
  const int64_t width_, steps_;
};

// Weight rows of the block's regions: in place, converted by the tiles of the region before, or here.
class RegionRows {
 public:
  RegionRows(const KernelChoice& choice, const WeightTiles& w, int64_t steps, Arena& arena) : w_(w) {
    const int64_t segment = choice.blocking.segment;
    if (!w.widens_rows({0, 0, segment, 0, steps})) return;
    const int64_t pitch = copy_pitch(*choice.kernels, min64(steps, w.depth()));
    for (LeftRows& rows : buffers_) rows = {static_cast<char*>(arena.take(segment * pitch)), pitch};
  }

  LeftRows of(const Region& now, Arena& arena) {
    if (!made_) return w_.rows(now.out, now.width, now.p, now.steps, arena);
    made_ = false;
    return buffers_[current_ = !current_];
  }
  // Has tiles make those of the next one.
  void make(const Region& region, NextRegion& next) {
    made_ = buffers_[0].data && w_.widens_rows(region);
    if (made_) next.to(buffers_[!current_]);
  }

 private:
  const WeightTiles& w_;
  LeftRows buffers_[2] = {};
  bool current_ = false, made_ = false;
};

// c: [width][ldc] = or += the rows times the panel.  fetch: where rows serve in place, these are new to the caches.
void multiply_panel(const Kernels& k, const WeightTiles& w, const PassRows& rows, const LanePanel& panel, bool fetch,
                    NextRegion& next, char* c, int64_t ldc) {
  const int vecs = k.vectors(panel.lanes), tallest = k.max_rows[vecs - 1];
  const Segment base{nullptr, rows.w.stride, panel.x + rows.p * panel.lanes * size_of(k.compute), rows.steps};
  TileArgs tile{{base, {nullptr, rows.b.stride, panel.u, rows.rank}},
                rows.rank ? 2 : 1,
                0,
                vecs,
                k.ends_in_half(panel.lanes),
                panel.lanes,
                nullptr,
                ldc,
                rows.start,
                {}};
  for (int64_t i = 0; i < rows.width; i += tallest) {
    const int64_t height = min64(tallest, rows.width - i);
    tile.segments[0].l = rows.w.at(i, 0);
    tile.segments[1].l = rows.b.at(i, 0);
    tile.rows = static_cast<int>(height);
    tile.c = c + i * ldc * accumulator_size(k);
    if (!w.in_place())
      next.share(tile);
    else if (fetch)
      tile.ahead = w.rows_ahead(rows.out + i + height, height, rows.p, rows.steps);
    run_tile(k, tile);
  }
}

int64_t tile_count(const Kernels& k, const LanePanel* panels, int64_t count, int64_t width) {
  int64_t tiles = 0;
  for (int64_t j = 0; j < count; ++j) tiles += ceil_div(width, k.max_rows[k.vectors(panels[j].lanes) - 1]);
  return tiles;
}

// What the rows of a block are packed to, and where their accumulators are.
struct BlockPanels {
  const LanePanel* panels;
  int64_t count;
  char* c;
  int64_t c_apart;
  char* by_row;  // of one panel
  int64_t segment;
};

// epilogue: of the last pass, whose results leave; null else.
void multiply_panels(const Kernels& k, const WeightTiles& w, const PassRows& rows, const BlockPanels& block,
                     const Epilogue* epilogue, int64_t row0, NextRegion& next) {
  const int64_t widest = k.lanes * k.vecs, segment = block.segment;
  for (int64_t j = 0; j < block.count; ++j) {
    const LanePanel& panel = block.panels[j];
    char* c = block.c + j * block.c_apart;
    if (epilogue) epilogue->expect(row0 + panel.first, panel.rows, rows.out, rows.width);
    multiply_panel(k, w, rows, panel, j == 0, next, c, widest);
    if (!epilogue) continue;
    k.transpose(block.by_row, segment, c, widest, rows.width, panel.rows);
    (*epilogue)(row0 + panel.first, panel.rows, block.by_row, segment * accumulator_size(k), rows.out, rows.width);
  }
}

// Rows at the end of a block that would be lanes of a vector mostly empty.
int64_t odd_rows(const KernelChoice& choice, const WeightTiles& weights, const BlockRange& range) {
  const Kernels& k = *choice.kernels;
  const int64_t odd = (range.row1 - range.row0) % k.lane_step();
  return weights.dots_as_stored() && odd <= choice.blocking.odd_rows ? odd : 0;
}

}  // namespace

// W[e]: [outputs, depth] rows, of each pass once for all panels.  x packed: [depth/pack][lanes][pack].
// C: [segment][lanes], then transposed. Some of the last rows are not packed.
void row_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                           const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Kernels& k = *choice.kernels;
  const Epilogue epilogue(choice, op, range, sums, arena);
  const WeightTiles w(k, op.w, range.expert), b(k, op.b, range.expert);
  const int64_t depth = w.depth(), rank = op.u.data ? b.depth() : 0, acc = accumulator_size(k);
  const int64_t segment = choice.blocking.segment, widest = k.lanes * k.vecs, odd = odd_rows(choice, w, range);
  BlockRange even = range, rest = range;
  even.row1 = rest.row0 = range.row1 - odd;
  const int64_t count = panel_count(k, even.row1 - even.row0);
  const LanePanel* panels = pack_rows(k, op, even, arena);
  const DotRows dots(choice, op, rest, arena);
  // Between passes, C of every panel waits.
  const int64_t c_bytes = segment * widest * acc, c_apart = depth > choice.blocking.depth ? c_bytes : 0;
  char* c = static_cast<char*>(arena.take(c_bytes + (count - 1) * c_apart));
  const BlockPanels block{panels, count, c, c_apart, static_cast<char*>(arena.take(c_bytes)), segment};

  // What takes work to make is made once for both: so many steps at a time that they are whole passes of either.
  const bool shared = odd > 0 && count > 0 && w.rows_are_dear();
  const int64_t pass = choice.blocking.depth, dot_pass = choice.blocking.dot_depth;
  const int64_t span = shared ? max64(dot_pass, pass) : pass;
  char* odd_c = static_cast<char*>(arena.take(odd * segment * acc));

  const Regions regions(choice.blocking, op, range, span);
  RegionRows region_rows(choice, w, span, arena);
  for (int64_t out = range.out0; out < range.out1; out += segment) {
    const int64_t width = min64(segment, range.out1 - out);
    for (int64_t q = 0; q < depth && count > 0; q += span) {
      Arena::Scope scope_of_span(arena);
      const Region now{range.expert, out, width, q, min64(span, depth - q)}, then = regions.after(now);
      const LeftRows some = region_rows.of(now, arena);
      NextRegion next(k, op.w, NextRegion::RowsAre::outputs, then, regions.after(then),
                      ceil_div(now.steps, pass) * tile_count(k, panels, count, width));
      if (!regions.ends(now)) region_rows.make(then, next);
      for (int64_t p = q; p < q + now.steps; p += pass) {
        const int64_t steps = min64(pass, depth - p);
        const bool last = p + steps == depth;
        PassRows rows{{some.data + (p - q) * size_of(k.compute), some.stride},
                      {},
                      out,
                      width,
                      p,
                      steps,
                      last ? rank : 0,
                      choice.blocking.start(p)};
        if (rows.rank) rows.b = b.rows(out, width, 0, rank, arena);
        multiply_panels(k, w, rows, block, last ? &epilogue : nullptr, range.row0, next);
      }
      for (int64_t p = q; shared && p < min64(q + span, depth); p += dot_pass)
        dots.pass({some.data + (p - q) * size_of(k.compute), some.stride}, out, width, p, odd_c, segment, arena);
    }
    if (odd == 0) continue;
    epilogue.expect(rest.row0, odd, out, width);
    if (!shared) dots(out, width, count == 0, odd_c, segment, arena);
    epilogue(rest.row0, odd, odd_c, segment * acc, out, width);
  }
}

}  // namespace moelora
