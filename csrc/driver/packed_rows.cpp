#include "driver/packed_rows.h"

namespace moelora {
namespace {

float fp32(const Matrix& m, int64_t row, int64_t col) { return *reinterpret_cast<const float*>(m.at(row, col)); }

}  // namespace

void PackedRows::unpack(const PackedPart& part, void* to, int64_t stride, int64_t ahead, Arena& arena) const {
  if (part.n <= 0 || part.rows <= 0) return;
  Arena::Scope scope(arena);
  UnpackArgs args = unpack_args(part, ahead, arena);
  args.to = to;
  args.to_stride = stride;
  run_unpack(k_, packed_.code, values_, args);
}

void PackedRows::unpack_lines(const PackedPart& part, void* to, int64_t stride, int64_t ahead, Arena& arena) const {
  if (part.n <= 0 || part.rows <= 0) return;
  Arena::Scope scope(arena);
  UnpackArgs args = unpack_args(part, ahead, arena);
  args.to = to;
  args.to_stride = stride;
  run_unpack_lines(k_, packed_.code, values_, args);
}

bool PackedRows::dot(const PackedPart& part, const DotArgs& args, int64_t ahead, Arena& arena) const {
  if (!k_.dot_codes[static_cast<int>(packed_.code)] || values_ != DType::bf16 || args.cols > k_.dot_codes_cols)
    return false;
  Arena::Scope scope(arena);
  const UnpackArgs codes = unpack_args(part, ahead, arena);
  return codes.ordinary && run_dot_codes(k_, packed_.code, codes, args);
}

bool PackedRows::flat(const PackedPart& part, const FlatArgs& args, int64_t ahead, Arena& arena) const {
  if (!k_.flat_codes[static_cast<int>(packed_.code)] || values_ != DType::bf16 || args.rows > k_.flat_codes_rows ||
      args.depth > kMaxFlatCodesDepth)
    return false;
  Arena::Scope scope(arena);
  const UnpackArgs codes = unpack_args(part, ahead, arena);
  return codes.ordinary && run_flat_codes(k_, packed_.code, codes, args);
}

// All but where to.
UnpackArgs PackedRows::unpack_args(const PackedPart& part, int64_t ahead, Arena& arena) const {
  const Scales& zero = packed_.zero;
  const int64_t each = packed_.scale.cols_each, group = part.first / each;
  const int64_t groups = ceil_div(part.first + part.n, each) - group;
  float* scales = arena.take_array<float>(part.rows * groups);
  const bool ordinary = read_scales(part.row, part.rows, group, groups, ahead, scales);
  float* zeros = nullptr;
  if (zero.data) {
    zeros = arena.take_array<float>(part.rows * groups);
    run_scales(k_, zero.type,
               {zero.at(expert_, part.row, group), part.rows, groups, zero.row_stride, zero.col_stride, 1.0f, 0.0f,
                nullptr, zeros, ahead * zero.row_stride});
  }
  return {row_codes(part.row),
          packed_.row_stride,
          part.rows,
          part.first,
          part.n,
          packed_.values,
          scales,
          zeros,
          groups,
          each,
          ordinary,
          nullptr,
          0,
          ahead * packed_.row_stride};
}

// Up to which row scales go on as at `row`.
int64_t PackedRows::rows_alike(int64_t row) const {
  int64_t end = packed_.rows;
  if (packed_.scale.rows_each > 1) end = (row / packed_.scale.rows_each + 1) * packed_.scale.rows_each;
  if (packed_.scale.type != ScaleType::e4m3) return end;
  const int64_t part = packed_.rows / packed_.scale2.cols;
  return min64(end, (row / part + 1) * part);
}

// to: [rows][n], those of groups [group, group + n). Whether all are ordinary.
bool PackedRows::read_scales(int64_t row, int64_t rows, int64_t group, int64_t n, int64_t ahead, float* to) const {
  const Scales& scale = packed_.scale;
  if (scale.type == ScaleType::indexed) return read_nested(row, rows, group, n, ahead, to);
  bool ordinary = true;
  for (int64_t end = row + rows, next; row < end; to += (next - row) * n, row = next) {
    next = min64(end, rows_alike(row));
    float factor = 1.0f;
    if (scale.type == ScaleType::e4m3)
      factor = fp32(packed_.scale2, expert_, row / (packed_.rows / packed_.scale2.cols));
    const int64_t row_stride = scale.rows_each == 1 ? scale.row_stride : 0;
    ordinary &= run_scales(k_, scale.type,
                           {scale.at(expert_, row / scale.rows_each, group), next - row, n, row_stride,
                            scale.col_stride, factor, 0.0f, nullptr, to, ahead * row_stride});
  }
  return ordinary;
}

// Rows whose scales have the same scale and offset are read together; one that lies across a border, in parts.
bool PackedRows::read_nested(int64_t row, int64_t rows, int64_t group, int64_t n, int64_t ahead, float* to) const {
  const Scales& scale = packed_.scale;
  const int64_t in_row = packed_.cols / scale.cols_each;
  const auto read = [&](int64_t count, int64_t first, int64_t width, int64_t block) {
    const ScaleArgs args{scale.at(expert_, row, first),
                         count,
                         width,
                         scale.row_stride,
                         scale.col_stride,
                         fp32(packed_.scale2, block, 0),
                         fp32(packed_.scale2, block, 1),
                         packed_.scale_values,
                         to,
                         ahead * scale.row_stride};
    to += count * width;
    return run_scales(k_, scale.type, args);
  };
  bool ordinary = true;
  for (const int64_t end = row + rows; row < end;) {
    const int64_t before = (expert_ * packed_.rows + row) * in_row + group;
    int64_t block = before / kNestedBlock, left = (block + 1) * kNestedBlock - before;
    if (left >= n) {
      const int64_t count = min64(end - row, (left - n) / in_row + 1);
      ordinary &= read(count, group, n, block);
      row += count;
      continue;
    }
    for (int64_t i = 0; i < n; i += left, left = kNestedBlock, ++block)
      ordinary &= read(1, group + i, min64(left, n - i), block);
    ++row;
  }
  return ordinary;
}

Ahead PackedRows::codes(const PackedPart& part) const {
  const int bits = bits_of(packed_.code);
  return {row_codes(part.row) + part.first * bits / 8, packed_.row_stride, part.rows, ceil_div(part.n * bits, 8)};
}

}  // namespace moelora
