#include "driver/packed_rows.h"

namespace moelora {
namespace {

float fp32(const Matrix& m, int64_t row, int64_t col) { return *reinterpret_cast<const float*>(m.at(row, col)); }

}  // namespace

void PackedRows::unpack(int64_t row, int64_t first, int64_t n, void* to, Arena& arena) const {
  if (n <= 0) return;
  Arena::Scope scope(arena);
  const Scales &scale = packed_.scale, &zero = packed_.zero;
  const int64_t group = first / scale.cols_each, groups = ceil_div(first + n, scale.cols_each) - group;
  float* scales = arena.take_array<float>(groups);
  read_scales(row, group, groups, scales);
  float* zeros = nullptr;
  if (zero.data) {
    zeros = arena.take_array<float>(groups);
    k_.scales[static_cast<int>(zero.type)](
        {zero.at(expert_, row / zero.rows_each, group), groups, zero.col_stride, 1.0f, 0.0f, nullptr, zeros});
  }
  unpack_({row_codes(row), first, n, packed_.values, scales, zeros, scale.cols_each, to});
}

// Those of groups [group, group + n).
void PackedRows::read_scales(int64_t row, int64_t group, int64_t n, float* to) const {
  const Scales& scale = packed_.scale;
  const int64_t row_group = row / scale.rows_each;
  const auto read = k_.scales[static_cast<int>(scale.type)];
  if (scale.type != ScaleType::indexed) {
    float factor = 1.0f;
    if (scale.type == ScaleType::e4m3)
      factor = fp32(packed_.scale2, expert_, row / (packed_.rows / packed_.scale2.cols));
    return read({scale.at(expert_, row_group, group), n, scale.col_stride, factor, 0.0f, nullptr, to});
  }
  const int64_t in_row = packed_.cols / scale.cols_each, before = (expert_ * packed_.rows + row) * in_row + group;
  for (int64_t i = 0, end; i < n; i = end) {
    const int64_t block = (before + i) / kNestedBlock;
    end = min64(n, (block + 1) * kNestedBlock - before);
    read({scale.at(expert_, row_group, group + i), end - i, scale.col_stride, fp32(packed_.scale2, block, 0),
          fp32(packed_.scale2, block, 1), packed_.scale_values, to + i});
  }
}

Ahead PackedRows::ahead(int64_t row, int64_t rows, int64_t first, int64_t n) const {
  const int bits = bits_of(packed_.code);
  return {row_codes(row) + first * bits / 8, packed_.row_stride, rows, ceil_div(n * bits, 8)};
}

}  // namespace moelora
