#include "driver/next_region.h"

namespace moelora {
void NextRegion::share(TileArgs& tile) {
  const Shares::Share share = shares_.take();
  if (widen_.rows > 0) {
    tile.widen.rows = share.count;
    if (share.count == 0) return;
    tile.widen = widen_;
    tile.widen.rows = share.count;
    tile.widen.from = static_cast<const char*>(widen_.from) + share.first * widen_.stride;
    tile.widen.to = static_cast<char*>(widen_.to) + share.first * widen_.to_stride;
    tile.widen.ahead = ahead(share.first);
  } else {
    tile.ahead = share_of(fetch_, share);
  }
}

const char* NextRegion::row(const WeightTiles& weights, const Region& region, int64_t i) const {
  return rows_are_ == RowsAre::outputs ? weights.at(region.out + i, region.p) : weights.at(region.out, region.p + i);
}

// From the region's row `first` to some rows on, which may be the region's behind.
int64_t NextRegion::ahead(int64_t first) const {
  const int64_t beyond = first + rows_ahead_ - rows(next_);
  if (beyond < 0) return rows_ahead_ * widen_.stride;
  return beyond < rows(later_) ? row(later_weights_, later_, beyond) - row(weights_, next_, first) : 0;
}

}  // namespace moelora
