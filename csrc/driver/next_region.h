// What tiles do for the region of weights that comes next.
#pragma once

#include "driver/weight_tiles.h"

namespace moelora {

// Shares of `rows` rows for as many tiles as there are, in turn.
class Shares {
 public:
  Shares(int64_t rows, int64_t tiles) : each_(rows / tiles), more_(rows % tiles), tiles_(tiles) {}

  struct Share {
    int64_t first, count;
  };
  Share take() {
    const int64_t first = done_;
    done_ += each_;
    if ((part_ += more_) >= tiles_) {
      part_ -= tiles_;
      ++done_;
    }
    return {first, done_ - first};
  }

 private:
  int64_t each_, more_, tiles_;
  int64_t part_ = 0, done_ = 0;
};

// rows: not through `runs`
inline Ahead share_of(Ahead rows, const Shares::Share& share) {
  rows.from = static_cast<const char*>(rows.from) + share.first * rows.stride;
  rows.rows = share.count;
  return rows;
}

// The region's rows in memory are outputs or steps. Each tile converts or fetches its share of them.
class NextRegion {
 public:
  enum class RowsAre : uint8_t { outputs, steps };

  // later: the region behind the next one.
  NextRegion(const Kernels& k, const Weights& weights, RowsAre rows_are, const Region& next, const Region& later,
             int64_t tiles)
      : weights_(k, weights, next.expert),
        later_weights_(k, weights, later.expert),
        rows_are_(rows_are),
        next_(next),
        later_(later),
        rows_ahead_(kBytesAhead / max64(1, row_bytes()) + 1),
        tiles_(tiles),
        fetch_(rows_are == RowsAre::outputs ? weights_.rows_ahead(next.out, next.width, next.p, next.steps)
                                            : weights_.strip_ahead(next.out, next.width, next.p, next.steps)),
        shares_(fetch_.rows, tiles) {}

  // Where the tiles convert the region to, if they do.
  void to(const LeftRows& rows) { widen(weights_.widen_rows(next_, rows)); }
  void to(char* panels, const StripLayout& layout) { widen(weights_.widen_strip(next_, panels, layout)); }

  // The next tile's share becomes part of its call. Of several calls with the same `tile`, too.
  void share(TileArgs& tile);

 private:
  static constexpr int64_t kBytesAhead = 2048;

  void widen(const Widen& all) {
    widen_ = all;
    shares_ = Shares(all.rows, tiles_);
  }
  int64_t row_bytes() const {
    return (rows_are_ == RowsAre::outputs ? next_.steps : next_.width) * weights_.element_size();
  }
  int64_t rows(const Region& region) const { return rows_are_ == RowsAre::outputs ? region.width : region.steps; }
  const char* row(const WeightTiles& weights, const Region& region, int64_t i) const;
  int64_t ahead(int64_t first) const;

  const WeightTiles weights_, later_weights_;
  const RowsAre rows_are_;
  const Region next_, later_;
  const int64_t rows_ahead_, tiles_;
  const Ahead fetch_;  // all of it, where nothing is converted
  Widen widen_;        // all of it, if anything
  Shares shares_;
};

}  // namespace moelora
