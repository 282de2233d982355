#include <cstring>

#include "driver/epilogue.h"
#include "driver/next_region.h"
#include "driver/rows.h"

namespace moelora {
namespace {

// How a block is cut into regions: each is packed once, for all rows.
struct Cut {
  int64_t width, pass, strips;  // of which a pass takes so many in turn

  Cut(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range) {
    const StripSize most = strip_size(op.w, choice.blocking, in_thin_passes(choice, range));
    width = min64(most.width, range.out1 - range.out0);
    pass = max64(1, min64(most.steps, op.w.cols()));
    strips = max64(1, choice.blocking.pass_outputs / width);
  }
  int64_t all() const { return width * strips; }
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
    if (cut_.all() < range.out1 - range.out0) x_ = x_rows(k_, op, range, arena);
    if (rank_) u_ = left_rows(k_, op.u, range.row0, rows_, 0, rank_, arena);
    widens_ = w_.widens_strip({0, 0, lanes_, 0, 0});
    for (char*& panels : panels_)
      if (widens_ || !panels_[0]) panels = static_cast<char*>(arena.take(layout_.bytes));
    b_panels_ = static_cast<char*>(arena.take(b_layout_.bytes));
    const int64_t sums = min64(cut_.strips, ceil_div(range.out1 - range.out0, cut_.width)) * c_bytes();
    c_ = static_cast<char*>(arena.take(sums));
    if (chains_in_passes()) total_ = static_cast<char*>(arena.take(sums));
  }

  void run(const Epilogue& epilogue, int64_t piece, Arena& arena) {
    for (int64_t first = range_.out0; first < range_.out1; first += cut_.all()) {
      const int64_t end = min64(first + cut_.all(), range_.out1);
      for (int64_t p = 0; p < w_.depth(); p += cut_.pass) {
        Arena::Scope scope(arena);
        const LeftRows x = x_.data ? LeftRows{x_.data + p * size_of(k_.compute), x_.stride}
                                   : x_rows(k_, op_, range_, p, min64(cut_.pass, w_.depth() - p), arena);
        for (int64_t out = first; out < end; out += cut_.width) {
          const int64_t before = (out - first) / cut_.width * c_bytes();
          run_region(region(out, p), x, c_ + before, total_ ? total_ + before : nullptr, epilogue, piece, arena);
        }
      }
    }
  }

 private:
  int64_t c_bytes() const { return rows_ * pitch_ * accumulator_size(k_); }

  // The strip from output `out` on, the pass from step `p` on.
  Region region(int64_t out, int64_t p) const {
    return {range_.expert, out, min64(cut_.width, range_.out1 - out), p, min64(cut_.pass, w_.depth() - p)};
  }

  // total: sums of chains, where these take several passes.
  void run_region(const Region& now, const LeftRows& x, char* c, char* total, const Epilogue& epilogue, int64_t piece,
                  Arena& arena) {
    const int64_t end = now.p + now.steps, acc = accumulator_size(k_);
    const bool last = end == w_.depth();
    if (last) epilogue.expect(range_.row0, rows_, now.out, min64(piece, now.width));
    multiply(now, x, c, arena);
    if (total && (last || end % chain_ == 0)) {
      if (end <= chain_)
        std::memcpy(total, c, static_cast<size_t>(c_bytes()));
      else
        k_.add(total, c, nullptr, 1.0, rows_ * pitch_);
    }
    for (int64_t j = 0; last && j < now.width; j += piece)
      epilogue(range_.row0, rows_, (total ? total : c) + j * acc, pitch_ * acc, now.out + j,
               min64(piece, now.width - j));
  }

  // Whether a chain takes several passes, and there are several chains: they are added up outside the tiles.
  bool chains_in_passes() const { return cut_.pass < chain_ && w_.depth() > chain_; }

  // What is packed next, probably.
  Region after(const Region& now) const {
    if (now.width == 0 || now.expert != range_.expert || now.out < range_.out0 || now.out >= range_.out1) return {};
    const int64_t first = range_.out0 + (now.out - range_.out0) / cut_.all() * cut_.all();
    const int64_t end = min64(first + cut_.all(), range_.out1), out = now.out + now.width, p = now.p + now.steps;
    if (out < end) return region(out, now.p);
    if (p < w_.depth()) return region(first, p);
    if (end < range_.out1) return region(end, 0);
    return range_.next ? Cut(choice_, op_, *range_.next).first(op_, *range_.next) : Region{};
  }

  Start start(int64_t p) const { return total_ && p % chain_ == 0 ? Start::zero : choice_.blocking.start(p); }

  bool ends(const Region& now) const { return now.p + now.steps == w_.depth() && now.out + now.width == range_.out1; }

  // c: [rows][pitch] (+)= rows times the region.  x: of its steps
  void multiply(const Region& now, const LeftRows& x, char* c, Arena& arena) {
    const bool with_lora = rank_ && now.p + now.steps == w_.depth();
    if (!made_) w_.strip(now.out, now.width, now.p, now.steps, panels_[current_], layout_, arena);
    if (with_lora) b_.strip(now.out, now.width, 0, rank_, b_panels_, b_layout_, arena);
    const int64_t panels = ceil_div(now.width, lanes_), tallest = k_.max_rows[k_.vecs - 1];
    const int64_t groups = ceil_div(rows_, tallest);
    const Region then = after(now);
    NextRegion next(k_, op_.w, NextRegion::RowsAre::steps, then, after(then), groups * panels);
    made_ = widens_ && !ends(now) && w_.widens_strip(then);
    if (made_) next.to(panels_[!current_], layout_);
    TileArgs tile{{{nullptr, x.stride, nullptr, now.steps}, {nullptr, u_.stride, nullptr, rank_}},
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
        tile.segments[0].l = x.at(row, 0);
        tile.segments[1].l = u_.at(row, 0);
        tile.rows = static_cast<int>(height);
        tile.c = c + (row * pitch_ + j * lanes_) * accumulator_size(k_);
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
  LeftRows x_{}, u_{};  // x: of all steps, where several rounds of passes read it
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
