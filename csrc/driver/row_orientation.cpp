#include "driver/dot_rows.h"
#include "driver/epilogue.h"
#include "driver/rows.h"
#include "driver/weight_tiles.h"

namespace moelora {
namespace {

// Weight rows of one segment, of one pass; LoRA's where it joins that pass.
struct PassRows {
  LeftRows w, b;
  int64_t out, width, p, steps, rank;
  Start start;
};

// Weight rows that are converted next, fetched by tiles, each its share.
struct NextRows {
  WeightTiles weights;
  int64_t out, width, p, steps, tiles, done = 0;

  Ahead share() {
    const int64_t first = done * width / tiles, last = ++done * width / tiles;
    return first == last ? Ahead{} : weights.rows_ahead(out + first, last - first, p, steps);
  }
};

// c: [width][ldc] = or += the rows times the panel.  fetch: where rows serve in place, these are new to the caches.
void multiply_panel(const Kernels& k, const WeightTiles& w, const PassRows& rows, const LanePanel& panel, bool fetch,
                    NextRows& next, char* c, int64_t ldc) {
  const int vecs = k.vectors(panel.lanes), tallest = k.max_rows[vecs - 1];
  for (int64_t i = 0; i < rows.width; i += tallest) {
    const int64_t height = min64(tallest, rows.width - i);
    const Segment base{rows.w.at(i, 0), rows.w.stride, panel.x + rows.p * panel.lanes * size_of(k.compute), rows.steps};
    const Segment lora{rows.b.at(i, 0), rows.b.stride, panel.u, rows.rank};
    Ahead ahead;
    if (!w.in_place())
      ahead = next.share();
    else if (fetch)
      ahead = w.rows_ahead(rows.out + i + height, height, rows.p, rows.steps);
    run_tile(k, {{base, lora},
                 rows.rank ? 2 : 1,
                 static_cast<int>(height),
                 vecs,
                 k.ends_in_half(panel.lanes),
                 panel.lanes,
                 c + i * ldc * accumulator_size(k),
                 ldc,
                 rows.start,
                 ahead});
  }
}

// What comes after outputs [out, out + width), steps [p, p + steps) of the block.
NextRows next_rows(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range, const PassRows& now,
                   int64_t tiles) {
  const int64_t depth = op.w.cols(), p = now.p + now.steps, out = now.out + now.width;
  const int64_t first = min64(choice.blocking.depth, depth);
  const auto rows = [&](int64_t expert, int64_t from, int64_t to, int64_t p0, int64_t steps) {
    return NextRows{{*choice.kernels, op.w, expert}, from, to - from, p0, steps, tiles};
  };
  if (p < depth) return rows(range.expert, now.out, out, p, min64(choice.blocking.depth, depth - p));
  if (out < range.out1) return rows(range.expert, out, min64(out + now.width, range.out1), 0, first);
  if (range.next == nullptr) return rows(range.expert, 0, 0, 0, 0);
  const int64_t to = min64(range.next->out0 + choice.blocking.segment, range.next->out1);
  return rows(range.next->expert, range.next->out0, to, 0, first);
}

int64_t tile_count(const Kernels& k, const LanePanel* panels, int64_t count, int64_t width) {
  int64_t tiles = 0;
  for (int64_t j = 0; j < count; ++j) tiles += ceil_div(width, k.max_rows[k.vectors(panels[j].lanes) - 1]);
  return tiles;
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
  char* by_row = static_cast<char*>(arena.take(c_bytes));

  // What takes work to make is made once for both: so many steps at a time that they are whole passes of either.
  const bool shared = odd > 0 && count > 0 && w.is_packed();
  const int64_t pass = choice.blocking.depth, span = shared ? round_up(DotRows::pass_of(k), pass) : pass;
  char* odd_c = static_cast<char*>(arena.take(odd * segment * acc));

  for (int64_t out = range.out0; out < range.out1; out += segment) {
    const int64_t width = min64(segment, range.out1 - out);
    for (int64_t q = 0; q < depth && count > 0; q += span) {
      Arena::Scope scope_of_span(arena);
      const LeftRows some = w.rows(out, width, q, min64(span, depth - q), arena);
      for (int64_t p = q; p < min64(q + span, depth); p += pass) {
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
        NextRows next = next_rows(choice, op, range, rows, tile_count(k, panels, count, width));
        for (int64_t j = 0; j < count; ++j) {
          const LanePanel& panel = panels[j];
          char* c_panel = c + j * c_apart;
          if (last) epilogue.expect(range.row0 + panel.first, panel.rows, out, width);
          multiply_panel(k, w, rows, panel, j == 0, next, c_panel, widest);
          if (!last) continue;
          k.transpose(by_row, segment, c_panel, widest, width, panel.rows);
          epilogue(range.row0 + panel.first, panel.rows, by_row, segment * acc, out, width);
        }
      }
      for (int64_t p = q; shared && p < min64(q + span, depth); p += DotRows::pass_of(k))
        dots.pass({some.data + (p - q) * size_of(k.compute), some.stride}, out, width, p, odd_c, segment, arena);
    }
    if (odd == 0) continue;
    epilogue.expect(rest.row0, odd, out, width);
    if (!shared) dots(out, width, count == 0, odd_c, segment, arena);
    epilogue(rest.row0, odd, odd_c, segment * acc, out, width);
  }
}

}  // namespace moelora
