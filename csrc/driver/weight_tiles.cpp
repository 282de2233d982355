#include "driver/weight_tiles.h"

namespace moelora {

WeightTiles::DotOperand WeightTiles::dot_rows(int64_t out, int64_t count, int64_t p, int64_t steps,
                                              Arena& arena) const {
  if (!packed_ && dots_as_stored())
    return {{matrix_.at(out, p), matrix_.row_stride * size_of(matrix_.dtype)}, matrix_.dtype};
  return {rows(out, count, p, steps, arena), k_.compute};
}

Ahead WeightTiles::rows_ahead(int64_t out, int64_t count, int64_t p, int64_t steps) const {
  if (out >= matrix_.rows) return {};
  count = min64(count, matrix_.rows - out);
  if (packed_) return turned_ ? packed_->ahead(p, steps, out, count) : packed_->ahead(out, count, p, steps);
  if (matrix_.col_stride != 1) return {};
  const int64_t size = size_of(matrix_.dtype);
  return {matrix_.at(out, p), matrix_.row_stride * size, count, steps * size};
}

Ahead WeightTiles::strip_ahead(int64_t out, int64_t width, int64_t p, int64_t steps) const {
  if (packed_) return steps <= 0 ? Ahead{} : rows_ahead(out, width, p, steps);
  if (out >= matrix_.rows || steps <= 0 || matrix_.row_stride != 1) return {};
  const int64_t size = size_of(matrix_.dtype);
  return {matrix_.at(out, p), matrix_.col_stride * size, steps, min64(width, matrix_.rows - out) * size};
}

bool WeightTiles::weaves(int64_t width, int64_t steps) const {
  return !packed_ && k_.weaves && matrix_.dtype == k_.compute && matrix_.row_stride == 1 &&
         width == k_.lanes * k_.vecs && steps % k_.pack == 0;
}

LeftRows WeightTiles::unpacked_rows(int64_t out, int64_t count, int64_t p, int64_t steps, Arena& arena) const {
  const int64_t pitch = copy_pitch(k_, steps), size = size_of(k_.compute);
  char* to = static_cast<char*>(arena.take(count * pitch));
  if (!turned_) {
    for (int64_t i = 0; i < count; ++i) packed_->unpack(out + i, p, steps, to + i * pitch, arena);
    return {to, pitch};
  }
  // Rows across the codes: only of weights of one output or one step, whose memory is in either order.
  Arena::Scope scope(arena);
  char* line = static_cast<char*>(arena.take(count * size));
  for (int64_t q = 0; q < steps; ++q) {
    packed_->unpack(p + q, out, count, line, arena);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * pitch + q * size, line + i * size, static_cast<size_t>(size));
  }
  return {to, pitch};
}

void WeightTiles::unpacked_strip(int64_t out, int64_t width, int64_t p, int64_t steps, void* panels, int64_t lanes,
                                 int64_t apart, Arena& arena) const {
  constexpr int64_t kSteps = 8;  // unpacked rows wait in L1
  Arena::Scope scope(arena);
  const int64_t size = size_of(k_.compute);
  const void** rows = arena.take_array<const void*>(max64(kSteps, width));
  if (!turned_) {
    const LeftRows unpacked = unpacked_rows(out, width, p, steps, arena);
    auto* panel = static_cast<char*>(panels);
    for (int64_t i = 0; i < width; ++i) rows[i] = unpacked.at(i, 0);
    for (int64_t lane = 0; lane < width; lane += lanes, panel += apart)
      run_pack_lanes(k_, k_.compute, {rows + lane, min64(lanes, width - lane), 0, steps, 1, panel, lanes});
    return;
  }
  const int64_t pitch = copy_pitch(k_, width);
  char* unpacked = static_cast<char*>(arena.take(kSteps * pitch));
  for (int64_t i = 0; i < kSteps; ++i) rows[i] = unpacked + i * pitch;
  for (int64_t q = 0; q < steps; q += kSteps) {
    const int64_t count = min64(kSteps, steps - q);
    for (int64_t i = 0; i < count; ++i) packed_->unpack(p + q + i, out, width, unpacked + i * pitch, arena);
    run_pack_depth(k_, k_.compute,
                   {rows, count, 0, width, 1, static_cast<char*>(panels) + q * lanes * size, lanes, apart});
  }
}

}  // namespace moelora
