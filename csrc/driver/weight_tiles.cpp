#include "driver/weight_tiles.h"

namespace moelora {
namespace {

// What tiles have fetched of a region's codes, others have driven out of L2 in part: rows whose distance is a power of
// two share few sets. From beyond it takes about as long as so many rows are unpacked.
constexpr int64_t kRowsAhead = 16;

}  // namespace

// fetch: the rows behind these are next.
WeightTiles::DotOperand WeightTiles::dot_rows(int64_t out, int64_t count, int64_t p, int64_t steps, bool fetch,
                                              Arena& arena) const {
  if (packed_) return {unpacked_rows(out, count, p, steps, fetch, arena), k_.compute};
  if (dots_as_stored()) return {{matrix_.at(out, p), matrix_.row_stride * size_of(matrix_.dtype)}, matrix_.dtype};
  return {rows(out, count, p, steps, arena), k_.compute};
}

Ahead WeightTiles::rows_ahead(int64_t out, int64_t count, int64_t p, int64_t steps) const {
  if (out >= matrix_.rows) return {};
  count = min64(count, matrix_.rows - out);
  if (packed_) return packed_->codes(turned_ ? PackedPart{p, steps, out, count} : PackedPart{out, count, p, steps});
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

Widen WeightTiles::widen_rows(const Region& region, const LeftRows& to) const {
  const int64_t unit = kWidenVecs * k_.lanes;
  return {.from = matrix_.at(region.out, region.p),
          .stride = matrix_.row_stride * size_of(matrix_.dtype),
          .rows = region.width,
          .n = region.steps,
          .to = const_cast<char*>(to.data),
          .to_stride = to.stride,
          .unit = unit,
          .units_apart = unit * size_of(k_.compute)};
}

Widen WeightTiles::widen_strip(const Region& region, char* panels, const StripLayout& layout) const {
  return {.from = matrix_.at(region.out, region.p),
          .stride = matrix_.col_stride * size_of(matrix_.dtype),
          .rows = region.steps,
          .n = region.width,
          .to = panels,
          .to_stride = layout.line * size_of(k_.compute),
          .unit = k_.lanes * k_.vecs,
          .units_apart = layout.apart};
}

bool WeightTiles::weaves(int64_t width, int64_t steps) const {
  return !packed_ && k_.weaves && matrix_.dtype == k_.compute && matrix_.row_stride == 1 &&
         width == k_.lanes * k_.vecs && steps % k_.pack == 0;
}

LeftRows WeightTiles::unpacked_rows(int64_t out, int64_t count, int64_t p, int64_t steps, bool fetch,
                                    Arena& arena) const {
  const int64_t pitch = copy_pitch(k_, steps), size = size_of(k_.compute);
  char* to = static_cast<char*>(arena.take(count * pitch));
  if (!turned_) {
    packed_->unpack({out, count, p, steps}, to, pitch, fetch ? 2 * count : 0, arena);
    return {to, pitch};
  }
  // Rows across the codes: only of weights of one output or one step, whose memory is in either order.
  Arena::Scope scope(arena);
  char* line = static_cast<char*>(arena.take(count * size));
  for (int64_t q = 0; q < steps; ++q) {
    packed_->unpack({p + q, 1, out, count}, line, 0, 0, arena);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * pitch + q * size, line + i * size, static_cast<size_t>(size));
  }
  return {to, pitch};
}

void WeightTiles::strip(int64_t out, int64_t width, int64_t p, int64_t steps, char* panels, const StripLayout& layout,
                        Arena& arena) const {
  if (!layout.side_by_side || !has_lines())
    return strip(out, width, p, steps, panels, layout.line, layout.side_by_side ? 0 : layout.apart, arena);
  const int64_t lane_bytes = k_.pack * size_of(k_.compute), stride = layout.line * lane_bytes;
  lines(out, width, p, steps, panels, stride, kRowsAhead, arena);
  const auto beyond = static_cast<size_t>((round_up(width, k_.lane_step()) - width) * lane_bytes);
  for (int64_t q = 0; beyond > 0 && q < ceil_div(steps, k_.pack); ++q)
    std::memset(panels + q * stride + width * lane_bytes, 0, beyond);
}

// Across the codes.
void WeightTiles::unpacked_strip(int64_t out, int64_t width, int64_t p, int64_t steps, void* panels, int64_t lanes,
                                 int64_t apart, Arena& arena) const {
  Arena::Scope scope(arena);
  const void** rows = arena.take_array<const void*>(width);
  const LeftRows unpacked = unpacked_rows(out, width, p, steps, false, arena);
  auto* panel = static_cast<char*>(panels);
  for (int64_t i = 0; i < width; ++i) rows[i] = unpacked.at(i, 0);
  for (int64_t lane = 0; lane < width; lane += lanes, panel += apart)
    run_pack_lanes(k_, k_.compute, {rows + lane, min64(lanes, width - lane), 0, steps, 1, panel, lanes});
}

StripSize strip_size(const Weights& w, const Blocking& blocking, bool thin) {
  if (!w.is_packed())
    return thin ? StripSize{blocking.thin_strip, blocking.thin_depth} : StripSize{blocking.strip, blocking.depth};
  const int64_t together = bits_of(w.packed.code) == 8 ? blocking.byte_strips : blocking.packed_strips;
  return {together * blocking.strip, min64(blocking.packed_depth, blocking.chain)};
}

}  // namespace moelora
