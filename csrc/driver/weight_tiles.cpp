#include "driver/weight_tiles.h"

namespace moelora {

WeightTiles::DotOperand WeightTiles::dot_rows(int64_t out, int64_t count, int64_t p, int64_t steps,
                                              Arena& arena) const {
  if (dots_as_stored()) return {{matrix_.at(out, p), matrix_.row_stride * size_of(matrix_.dtype)}, matrix_.dtype};
  return {rows(out, count, p, steps, arena), k_.compute};
}

Ahead WeightTiles::rows_ahead(int64_t out, int64_t count, int64_t p, int64_t steps) const {
  if (out >= matrix_.rows || matrix_.col_stride != 1) return {};
  const int64_t size = size_of(matrix_.dtype);
  return {matrix_.at(out, p), matrix_.row_stride * size, min64(count, matrix_.rows - out), steps * size};
}

Ahead WeightTiles::strip_ahead(int64_t out, int64_t width, int64_t p, int64_t steps) const {
  if (out >= matrix_.rows || steps <= 0 || matrix_.row_stride != 1) return {};
  const int64_t size = size_of(matrix_.dtype);
  return {matrix_.at(out, p), matrix_.col_stride * size, steps, min64(width, matrix_.rows - out) * size};
}

bool WeightTiles::weaves(int64_t width, int64_t steps) const {
  return k_.weaves && matrix_.dtype == k_.compute && matrix_.row_stride == 1 && width == k_.lanes * k_.vecs &&
         steps % k_.pack == 0;
}

}  // namespace moelora
