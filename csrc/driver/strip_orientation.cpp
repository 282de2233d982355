#include <cstring>

#include "driver/epilogue.h"
#include "driver/next_region.h"
#include "driver/rows.h"

namespace moelora {
namespace {

// How a block is cut into regions: each is packed once, for all rows.
struct Cut {
  int64_t width, pass;

  Cut(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range) {
    const Blocking& b = choice.blocking;
    const bool thin = in_thin_passes(choice, range), packed = op.w.is_packed();
    width = min64(packed ? b.packed_strips * b.strip : thin ? b.thin_strip : b.strip, range.out1 - range.out0);
    pass = max64(1, min64(packed ? min64(b.packed_depth, b.chain) : thin ? b.thin_depth : b.depth, op.w.cols()));
  }
  Region first(const GroupedLinear& op, const BlockRange& range) const {
    return {range.expert, range.out0, width, 0, min64(pass, op.w.cols())};
  }
};

class StripBlock {
 public:
  StripBlock(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range, Arena& arena)
      : choice_(choice),
        k_(*choice.kernels),
        op_(op),
        range_(range),
        w_(k_, op.w, range.expert),
        b_(k_, op.b, range.expert),
        cut_(choice, op, range),
        chain_(choice.blocking.chain),
        rank_(op.u.data ? b_.depth() : 0),
        rows_(range.row1 - range.row0),
        lanes_(k_.lanes * k_.vecs),
        pitch_(round_up(cut_.width, lanes_)),
        layout_(k_, w_.has_lines(), cut_.width, cut_.pass),
        b_layout_(k_, w_.has_lines(), cut_.width, rank_) {
    x_ = x_rows(k_, op, range, arena);
    if (rank_) u_ = left_rows(k_, op.u, range.row0, rows_, 0, rank_, arena);
    widens_ = w_.widens_strip({0, 0, lanes_, 0, 0});
    for (char*& panels : panels_)
      if (widens_ || !panels_[0]) panels = static_cast<char*>(arena.take(layout_.bytes));
    b_panels_ = static_cast<char*>(arena.take(b_layout_.bytes));
    c_ = static_cast<char*>(arena.take(c_bytes()));
    if (chains_in_passes()) total_ = static_cast<char*>(arena.take(c_bytes()));
  }

  void run(const Epilogue& epilogue, int64_t piece, Arena& arena) {
    const int64_t depth = w_.depth();
    for (int64_t out = range_.out0; out < range_.out1; out += cut_.width) {
      Region now{range_.expert, out, min64(cut_.width, range_.out1 - out), 0, 0};
      for (; now.p < depth; now.p += cut_.pass) {
        now.steps = min64(cut_.pass, depth - now.p);
        if (now.p + now.steps == depth) epilogue.expect(range_.row0, rows_, out, min64(piece, now.width));
        multiply(now, arena);
        const int64_t end = now.p + now.steps;
        if (!total_ || (end < depth && end % chain_ != 0)) continue;
        if (end <= chain_)
          std::memcpy(total_, c_, static_cast<size_t>(c_bytes()));
        else
          k_.add(total_, c_, nullptr, 1.0, rows_ * pitch_);
      }
      const int64_t acc = accumulator_size(k_);
      for (int64_t j = 0; j < now.width; j += piece)
        epilogue(range_.row0, rows_, (total_ ? total_ : c_) + j * acc, pitch_ * acc, out + j,
                 min64(piece, now.width - j));
    }
  }

 private:
  int64_t c_bytes() const { return rows_ * pitch_ * accumulator_size(k_); }

  // Whether a chain takes several passes, and there are several chains: they are added up outside the tiles.
  bool chains_in_passes() const { return cut_.pass < chain_ && w_.depth() > chain_; }

  // What is packed next, probably.
  Region after(const Region& now) const {
    const int64_t depth = w_.depth(), p = now.p + now.steps, out = now.out + now.width;
    if (p < depth) return {now.expert, now.out, now.width, p, min64(cut_.pass, depth - p)};
    if (out < range_.out1) return {now.expert, out, min64(cut_.width, range_.out1 - out), 0, min64(cut_.pass, depth)};
    if (range_.next == nullptr || now.width == 0) return {};
    return Cut(choice_, op_, *range_.next).first(op_, *range_.next);
  }

  Start start(int64_t p) const { return total_ && p % chain_ == 0 ? Start::zero : choice_.blocking.start(p); }

  bool ends(const Region& now) const { return now.p + now.steps == w_.depth() && now.out + now.width == range_.out1; }

  // c: [rows][pitch] (+)= rows times the region.
  void multiply(const Region& now, Arena& arena) {
    const bool with_lora = rank_ && now.p + now.steps == w_.depth();
    if (!made_) w_.strip(now.out, now.width, now.p, now.steps, panels_[current_], layout_, arena);
    if (with_lora) b_.strip(now.out, now.width, 0, rank_, b_panels_, b_layout_, arena);
    const int64_t panels = ceil_div(now.width, lanes_), tallest = k_.max_rows[k_.vecs - 1];
    const int64_t groups = ceil_div(rows_, tallest);
    const Region then = after(now);
    NextRegion next(k_, op_.w, NextRegion::RowsAre::steps, then, after(then), groups * panels);
    made_ = widens_ && !ends(now) && w_.widens_strip(then);
    if (made_) next.to(panels_[!current_], layout_);
    TileArgs tile{{{nullptr, x_.stride, nullptr, now.steps}, {nullptr, u_.stride, nullptr, rank_}},
                  with_lora ? 2 : 1,
                  0,
                  0,
                  false,
                  layout_.line,
                  nullptr,
                  pitch_,
                  start(now.p),
                  {}};
    // A panel stays in L1 while the rows pass by.
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t lanes = round_up(min64(lanes_, now.width - j * lanes_), k_.lane_step());
      tile.vecs = k_.vectors(lanes);
      tile.half = k_.ends_in_half(lanes);
      tile.segments[0].r = panels_[current_] + j * layout_.apart;
      tile.segments[1].r = b_panels_ + j * b_layout_.apart;
      Shares heights(rows_, groups);
      for (int64_t t = 0; t < groups; ++t) {
        const auto [row, height] = heights.take();
        tile.segments[0].l = x_.at(row, now.p * size_of(k_.compute));
        tile.segments[1].l = u_.at(row, 0);
        tile.rows = static_cast<int>(height);
        tile.c = c_ + (row * pitch_ + j * lanes_) * accumulator_size(k_);
        next.share(tile);
        run_tile(k_, tile);
      }
    }
    current_ = made_ ? !current_ : current_;
  }

  const KernelChoice& choice_;
  const Kernels& k_;
  const GroupedLinear& op_;
  const BlockRange& range_;
  const WeightTiles w_, b_;
  const Cut cut_;
  const int64_t chain_, rank_, rows_, lanes_, pitch_;
  const StripLayout layout_, b_layout_;
  LeftRows x_{}, u_{};
  char *panels_[2] = {}, *b_panels_, *c_, *total_ = nullptr;
  bool widens_, current_ = false, made_ = false;  // whether the current panels were made by the tiles before
};

}  // namespace

// x: rows in place.  W[e] packed: [panels][depth/pack][lanes][pack], lanes are outputs.  C: [rows][outputs].
void strip_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                             const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Epilogue epilogue(choice, op, range, sums, arena);
  StripBlock(choice, op, range, arena).run(epilogue, segment_width(choice, op), arena);
}

}  // namespace moelora
