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
  const int64_t each_, more_, tiles_;
  int64_t part_ = 0, done_ = 0;
};

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
        shares_(rows(next), tiles) {}

  // Where the tiles convert the region to, if they do.
  void to(const LeftRows& rows) { left_ = rows; }
  void to(char* panels, const StripLayout& layout) {
    panels_ = panels;
    layout_ = &layout;
  }

  // The next tile's share becomes part of its call.
  void share(TileArgs& tile);

 private:
  int64_t rows(const Region& region) const { return rows_are_ == RowsAre::outputs ? region.width : region.steps; }
  const char* row(const WeightTiles& weights, const Region& region, int64_t i) const;
  int64_t ahead(int64_t first) const;

  const WeightTiles weights_, later_weights_;
  const RowsAre rows_are_;
  const Region next_, later_;
  Shares shares_;
  LeftRows left_{};
  char* panels_ = nullptr;
  const StripLayout* layout_ = nullptr;
};

}  // namespace moelora
