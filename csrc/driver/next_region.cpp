#include "driver/next_region.h"

namespace moelora {
namespace {

constexpr int64_t kBytesAhead = 2048;

}  // namespace

void NextRegion::share(TileArgs& tile) {
  const auto [first, count] = shares_.take();
  if (count == 0) return;
  const bool outputs = rows_are_ == RowsAre::outputs;
  if (left_.data || panels_) {
    tile.widen = outputs ? weights_.widen_rows(next_, first, count, left_)
                         : weights_.widen_strip(next_, first, count, panels_, *layout_);
    tile.widen.ahead = ahead(first);
    return;
  }
  tile.ahead = outputs ? weights_.rows_ahead(next_.out + first, count, next_.p, next_.steps)
                       : weights_.strip_ahead(next_.out, next_.width, next_.p + first, count);
}

const char* NextRegion::row(const WeightTiles& weights, const Region& region, int64_t i) const {
  return rows_are_ == RowsAre::outputs ? weights.at(region.out + i, region.p) : weights.at(region.out, region.p + i);
}

// From the region's row `first` to some rows on, which may be the region's behind.
int64_t NextRegion::ahead(int64_t first) const {
  const int64_t elements = rows_are_ == RowsAre::outputs ? next_.steps : next_.width;
  const int64_t at = first + max64(1, kBytesAhead / (elements * weights_.element_size())), beyond = at - rows(next_);
  const char* from = row(weights_, next_, first);
  if (beyond < 0) return row(weights_, next_, at) - from;
  return beyond < rows(later_) ? row(later_weights_, later_, beyond) - from : 0;
}

}  // namespace moelora
