#include "driver/dot_rows.h"
#include "driver/epilogue.h"
#include "driver/rows.h"

namespace moelora {

DotRows::DotRows(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range, Arena& arena)
    : choice_(choice),
      w_(*choice.kernels, op.w, range.expert),
      b_(*choice.kernels, op.b, range.expert),
      rank_(op.u.data ? op.b.cols : 0),
      rows_(range.row1 - range.row0),
      groups_(ceil_div(rows_, kMaxDotCols)) {
  const Kernels& k = *choice.kernels;
  x_ = x_rows(k, op, range, arena);
  if (rank_) u_ = left_rows(k, op.u, range.row0, rows_, 0, rank_, arena);
  if (rows_) height_ = k.dot_rows[ceil_div(rows_, groups_) - 1];
}

void DotRows::operator()(int64_t out, int64_t width, bool fetch, char* c, int64_t ldc, Arena& arena) const {
  const Kernels& k = *choice_.kernels;
  bool as_codes = true;  // until some must be unpacked: those that follow then probably must, too
  const auto tile = [&](int64_t i, int64_t p) {
    Arena::Scope scope(arena);
    const int64_t height = min64(height_, width - i);
    as_codes = as_codes && codes_row(out + i, height, p, fetch, c + i * accumulator_size(k), ldc, arena);
    if (as_codes) return;
    const WeightTiles::DotOperand rows = w_.dot_rows(out + i, height, p, steps_from(p), fetch, arena);
    const Ahead ahead = fetch && !w_.dot_rows_fetch() ? after(out + i, height, p) : Ahead{};
    tile_row(rows, ahead, out + i, height, p, c + i * accumulator_size(k), ldc, arena);
  };
  // Weights in the order of their memory.
  for (int64_t i = 0; i < width; i += height_)
    for (int64_t p = 0; p < w_.depth(); p += choice_.blocking.dot_depth) tile(i, p);
}

// What is read after the pass from step p on of weight rows [out, out + height).
Ahead DotRows::after(int64_t out, int64_t height, int64_t p) const {
  const int64_t next = p + steps_from(p);
  Ahead ahead = next < w_.depth() ? w_.rows_ahead(out, height, next, steps_from(next))
                                  : w_.rows_ahead(out + height, height, 0, steps_from(0));
  ahead.to_l1 = choice_.blocking.rows_to_l1;
  return ahead;
}

void DotRows::pass(const LeftRows& w, int64_t out, int64_t width, int64_t p, char* c, int64_t ldc, Arena& arena) const {
  const Kernels& k = *choice_.kernels;
  for (int64_t i = 0; i < width; i += height_) {
    Arena::Scope scope(arena);
    tile_row({{w.data + i * w.stride, w.stride}, k.compute}, {}, out + i, min64(height_, width - i), p,
             c + i * accumulator_size(k), ldc, arena);
  }
}

// Of group g of the rows; w: weight rows [out, out + height), or none.
DotArgs DotRows::tile_args(const LeftRows& w, const LeftRows& b, int64_t height, int64_t p, int64_t g, char* c,
                           int64_t ldc) const {
  const Kernels& k = *choice_.kernels;
  const int64_t first = g * rows_ / groups_, cols = (g + 1) * rows_ / groups_ - first;
  const DotSegment base{w.data, w.stride, x_.at(first, p * size_of(k.compute)), x_.stride, steps_from(p)};
  const DotSegment lora{b.data, b.stride, u_.at(first, 0), u_.stride, rank_};
  return {{base, lora},
          joins_lora(p) ? 2 : 1,
          static_cast<int>(height),
          static_cast<int>(cols),
          c + first * ldc * accumulator_size(k),
          ldc,
          p > 0,
          {}};
}

// Weight rows [out, out + height), one pass.
void DotRows::tile_row(const WeightTiles::DotOperand& w, const Ahead& ahead, int64_t out, int64_t height, int64_t p,
                       char* c, int64_t ldc, Arena& arena) const {
  const Kernels& k = *choice_.kernels;
  const LeftRows b_rows = joins_lora(p) ? b_.rows(out, height, 0, rank_, arena) : LeftRows{};
  for (int64_t g = 0; g < groups_; ++g) {
    DotArgs args = tile_args(w.rows, b_rows, height, p, g, c, ldc);
    if (g == 0) args.ahead = ahead;
    run_dot_tile(k, w.storage, args);
  }
}

// The same of codes as they are; false if it takes unpacking.
bool DotRows::codes_row(int64_t out, int64_t height, int64_t p, bool fetch, char* c, int64_t ldc, Arena& arena) const {
  if (!w_.has_dot_codes() || groups_ != 1) return false;
  const LeftRows b_rows = joins_lora(p) ? b_.rows(out, height, 0, rank_, arena) : LeftRows{};
  DotArgs args = tile_args({}, b_rows, height, p, 0, c, ldc);
  if (fetch) args.ahead = after(out, height, p);
  return w_.dot_codes(out, height, p, steps_from(p), fetch, args, arena);
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

}  // namespace moelora
