#include "ukernel/contract.h"

#ifdef MOELORA_SANITIZED

extern "C" int dprintf(int file, const char* format, ...);

namespace moelora {
namespace {

// One call under check: its kernels and what it is called.
struct Call {
  const Kernels& k;
  const char* name;

  void require(bool holds, const char* what, int64_t got) const {
    if (holds) return;
    dprintf(2, "%s of %s: %s, got %lld\n", name, k.name, what, static_cast<long long>(got));
    __builtin_abort();
  }
  void in_range(int64_t value, int64_t least, int64_t most, const char* what) const {
    require(value >= least && value <= most, what, value);
  }
  void given(const void* p, const char* what) const { require(p != nullptr, what, 0); }
  // Elements of `size` bytes.
  void aligned(const void* p, int64_t stride, int64_t size, const char* what) const {
    require(reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(size) == 0, what,
            static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)));
    require(stride % size == 0, what, stride);
  }
};

int64_t accumulator_size(const Kernels& k) { return k.compute == DType::f64 ? 8 : 4; }

void check_ahead(const Call& call, const Ahead& ahead) {
  call.require(ahead.rows >= 0, "ahead.rows must be at least 0", ahead.rows);
  if (ahead.rows == 0) return;
  call.require(ahead.bytes >= 0, "ahead.bytes must be at least 0", ahead.bytes);
  call.require((ahead.from == nullptr) != (ahead.runs == nullptr), "ahead must have one of from and runs", 0);
}

void check_segment(const Call& call, const Segment& segment) {
  const int64_t size = size_of(call.k.compute);
  call.require(segment.depth >= 0, "depth must be at least 0", segment.depth);
  if (segment.depth > 0) {
    call.given(segment.l, "l must not be null");
    if (segment.rows == nullptr) call.given(segment.r, "r must not be null");
  }
  call.aligned(segment.l, segment.l_stride, size, "l must be aligned to its elements");
  call.aligned(segment.r, 0, size, "r must be aligned to its elements");
}

// Tiles that pack on the way: the first segment's panel, or one for later.
void check_weaving(const Call& call, const TileArgs& args) {
  const Kernels& k = call.k;
  const Segment& first = args.segments[0];
  if (args.n_segments == 2) call.require(!args.segments[1].rows, "only the first segment may have rows", 1);
  call.require(args.weave.depth >= 0, "weave.depth must be at least 0", args.weave.depth);
  const bool own = first.rows != nullptr, later = args.weave.depth > 0;
  if (!own && !later) return;
  call.require(!(own && later), "weave must not come beside rows", args.weave.depth);
  call.require(k.weaves, "rows and weave are for kernel sets that weave", 0);
  call.require(args.vecs == k.vecs, "only the widest tiles weave: vecs", args.vecs);
  call.require(!args.half, "a tile that weaves must have no half vector", 1);
  if (own) {
    call.require(first.depth % k.pack == 0, "the depth of rows must be a multiple of pack", first.depth);
    return call.aligned(first.rows, first.rows_stride, size_of(k.compute), "rows must be aligned to its elements");
  }
  call.require(args.weave.depth % k.pack == 0, "weave.depth must be a multiple of pack", args.weave.depth);
  call.require(args.weave.depth <= first.depth, "weave.depth must be at most the first depth", args.weave.depth);
  call.given(args.weave.rows, "weave.rows must not be null");
  call.given(args.weave.panel, "weave.panel must not be null");
  call.aligned(args.weave.rows, args.weave.rows_stride, size_of(k.compute), "weave.rows must be aligned");
}

void check_widening(const Call& call, const TileArgs& args) {
  const Kernels& k = call.k;
  const Widen& widen = args.widen;
  call.require(widen.rows >= 0, "widen.rows must be at least 0", widen.rows);
  if (widen.rows == 0) return;
  call.require(k.widens, "widen is for kernel sets that widen", widen.rows);
  call.require(args.ahead.rows == 0, "widen must not come beside ahead", args.ahead.rows);
  call.require(widen.unit == kWidenVecs * k.lanes || widen.unit == k.vecs * k.lanes,
               "widen.unit must be kWidenVecs vectors or the widest tile's", widen.unit);
  call.require(widen.n > 0 && widen.n % widen.unit == 0, "widen.n must be whole units", widen.n);
  call.require((widen.from == nullptr) != (widen.runs == nullptr), "widen must have one of from and runs", 0);
  call.given(widen.to, "widen.to must not be null");
  call.aligned(widen.from, widen.stride, size_of(DType::bf16), "widen.from must be aligned to its elements");
  call.aligned(widen.to, widen.to_stride, size_of(k.compute), "widen.to must be aligned to its elements");
  call.require(widen.units_apart % size_of(k.compute) == 0, "widen.units_apart must be whole elements",
               widen.units_apart);
}

void check_pack(const Call& call, const PackArgs& args, int64_t lanes, int64_t depth) {
  const int64_t step = call.k.lane_step();
  call.require(args.n_rows >= 0, "n_rows must be at least 0", args.n_rows);
  call.require(args.first >= 0, "first must be at least 0", args.first);
  call.require(args.n >= 0, "n must be at least 0", args.n);
  call.require(args.panel_lanes % step == 0, "panel_lanes must be whole steps", args.panel_lanes);
  call.require(args.panel_lanes > 0 || lanes == 0, "panel_lanes must be at least 1", args.panel_lanes);
  call.require(args.panel_lanes >= lanes || args.panels_apart != 0, "panel_lanes must hold every lane",
               args.panel_lanes);
  if (depth > 0) call.given(args.panel, "panel must not be null");
  if (args.n_rows > 0) call.given(args.rows, "rows must not be null");
  for (int64_t i = 0; i < args.n_rows && args.n > 0; ++i) call.given(args.rows[i], "no row may be null");
}

}  // namespace

void check(const Kernels& k, const TileArgs& args) {
  const Call call{k, "tile"};
  call.in_range(args.n_segments, 1, 2, "n_segments must be 1 or 2");
  call.in_range(args.vecs, 1, k.vecs, "vecs must be at least 1 and at most the widest tile's");
  call.in_range(args.rows, 1, k.max_rows[args.vecs - 1], "rows must be at least 1 and at most the tallest tile's");
  call.require(args.start != Start::add || k.compute != DType::bf16, "bf16 kernels must not add to C", 1);
  call.require(k.halves || !args.half, "half is for kernel sets that have halves", args.half);
  const int64_t lanes = int64_t{args.vecs} * k.lanes - (args.half ? k.lanes / 2 : 0);
  call.require(args.panel_lanes >= lanes, "panel_lanes must be at least the lanes of the tile", args.panel_lanes);
  call.require(args.panel_lanes % k.lane_step() == 0, "panel_lanes must be whole steps", args.panel_lanes);
  call.given(args.c, "c must not be null");
  call.aligned(args.c, 0, accumulator_size(k), "c must be aligned to its elements");
  call.require(args.rows == 1 || args.ldc >= lanes, "ldc must be at least the lanes of the tile", args.ldc);
  for (int s = 0; s < args.n_segments; ++s) check_segment(call, args.segments[s]);
  check_weaving(call, args);
  check_widening(call, args);
  check_ahead(call, args.ahead);
}

void check(const Kernels& k, const DotArgs& args, DType l) {
  const Call call{k, "dot_tile"};
  call.require(k.dot_tile[static_cast<int>(l)] != nullptr, "there must be a dot tile for l", static_cast<int>(l));
  call.in_range(args.n_segments, 1, 2, "n_segments must be 1 or 2");
  call.in_range(args.cols, 1, kMaxDotCols, "cols must be at least 1 and at most kMaxDotCols");
  call.in_range(args.rows, 1, k.dot_rows[args.cols - 1], "rows must be at least 1 and at most dot_rows");
  call.given(args.c, "c must not be null");
  call.aligned(args.c, 0, accumulator_size(k), "c must be aligned to its elements");
  call.require(args.cols == 1 || args.ldc >= args.rows, "ldc must be at least rows", args.ldc);
  for (int s = 0; s < args.n_segments; ++s) {
    const DotSegment& segment = args.segments[s];
    call.require(segment.depth >= 0, "depth must be at least 0", segment.depth);
    call.aligned(segment.l, segment.l_stride, size_of(s == 0 ? l : k.compute), "l must be aligned to its elements");
    call.aligned(segment.r, segment.r_stride, size_of(k.compute), "r must be aligned to its elements");
    if (segment.depth == 0) continue;
    call.given(segment.l, "l must not be null");
    call.given(segment.r, "r must not be null");
  }
  check_ahead(call, args.ahead);
  call.require(args.ahead.runs == nullptr, "ahead must have no runs", 1);
}

namespace {

void check_flat(const Call& call, const FlatArgs& args, DType r) {
  const Kernels& k = call.k;
  check_ahead(call, args.ahead);
  call.require(args.ahead.runs == nullptr, "ahead must have no runs", 1);
  call.in_range(args.rows, 1, kMaxFlatRows, "rows must be at least 1 and at most kMaxFlatRows");
  call.require(args.width >= 0, "width must be at least 0", args.width);
  call.require(args.depth >= 0, "depth must be at least 0", args.depth);
  call.require(args.start != Start::add, "flat tiles must not add to C", 1);
  call.require(args.rows == 1 || args.ldc >= args.width, "ldc must be at least width", args.ldc);
  call.aligned(args.c, 0, accumulator_size(k), "c must be aligned to its elements");
  call.aligned(args.l, args.l_stride, size_of(k.compute), "l must be aligned to its elements");
  call.aligned(args.r, args.r_stride, size_of(r), "r must be aligned to its elements");
  if (args.width == 0) return;
  call.given(args.c, "c must not be null");
  if (args.depth == 0) return;
  call.given(args.l, "l must not be null");
  call.given(args.r, "r must not be null");
}

void check_codes(const Call& call, Code code, DType values, const UnpackArgs& args) {
  const int64_t size = size_of(call.k.compute);
  call.require(args.rows >= 0, "rows must be at least 0", args.rows);
  call.require(args.first >= 0, "first must be at least 0", args.first);
  call.require(args.n >= 0, "n must be at least 0", args.n);
  call.require(args.group >= 1, "group must be at least 1", args.group);
  call.given(args.codes, "codes must not be null");
  call.given(args.to, "to must not be null");
  call.aligned(args.to, args.to_stride, size, "to must be aligned to its elements");
  if (bits_of(code) == 4) call.given(args.values, "nibbles must have values");
  call.require(bits_of(code) == 4 || !args.zero, "only nibbles may have zero points", 1);
  call.in_range(static_cast<int>(values), 0, kDTypes - 1, "values must be a type");
  call.given(args.scale, "scale must not be null");
  if (args.n == 0) return;
  const int64_t groups = (args.first + args.n - 1) / args.group - args.first / args.group + 1;
  call.require(args.rows <= 1 || args.scale_stride >= groups, "scale_stride must hold every group", args.scale_stride);
  for (int64_t i = 0; i < args.rows * groups; ++i) {
    const float scale = args.scale[i / groups * args.scale_stride + i % groups];
    const float magnitude = scale < 0 ? -scale : scale;
    call.require(!args.ordinary || scale == 0 || (magnitude >= kLeastOrdinary && magnitude <= kMostOrdinary),
                 "ordinary scales must be", static_cast<int64_t>(bit_cast<uint32_t>(scale)));
    call.require(scale == scale || bit_cast<uint32_t>(scale) << 1 == 0xff800000u, "a scale that is NaN must stay it",
                 static_cast<int64_t>(bit_cast<uint32_t>(scale)));
  }
}

}  // namespace

void check(const Kernels& k, const FlatArgs& args, DType r) {
  const Call call{k, "flat_tile"};
  call.require(k.flat_tile[static_cast<int>(r)] != nullptr, "there must be a flat tile for r", static_cast<int>(r));
  check_flat(call, args, r);
}

void check_flat_lines(const Kernels& k, const FlatArgs& args) {
  const Call call{k, "flat_lines"};
  call.require(k.flat_lines != nullptr, "there must be a flat tile for lines", 0);
  check_flat(call, args, k.compute);
}

void check_unpack(const Kernels& k, Code code, DType values, const UnpackArgs& args) {
  const Call call{k, "unpack"};
  call.require(k.unpack[static_cast<int>(code)][static_cast<int>(values)] != nullptr,
               "there must be an unpack to values", static_cast<int>(values));
  check_codes(call, code, values, args);
  call.require(args.rows <= 1 || args.to_stride >= args.n * size_of(k.compute), "to_stride must hold a row",
               args.to_stride);
}

void check_unpack_lines(const Kernels& k, Code code, DType values, const UnpackArgs& args) {
  const Call call{k, "unpack_lines"};
  call.require(k.unpack_lines[static_cast<int>(code)][static_cast<int>(values)] != nullptr,
               "there must be an unpack_lines to values", static_cast<int>(values));
  check_codes(call, code, values, args);
  call.require(args.rows <= k.pack || args.to_stride >= args.n * k.pack * size_of(k.compute),
               "to_stride must hold a line", args.to_stride);
}

void check_dot_codes(const Kernels& k, Code code, const UnpackArgs& l, const DotArgs& args) {
  const Call call{k, "dot_codes"};
  call.require(k.dot_codes[static_cast<int>(code)] != nullptr, "there must be a dot tile of codes", 1);
  call.in_range(args.n_segments, 1, 2, "n_segments must be 1 or 2");
  call.in_range(args.cols, 1, k.dot_codes_cols, "cols must be at least 1 and at most dot_codes_cols");
  call.in_range(args.rows, 1, k.dot_rows[args.cols - 1], "rows must be at least 1 and at most dot_rows");
  call.require(args.cols == 1 || args.ldc >= args.rows, "ldc must be at least rows", args.ldc);
  call.require(args.ahead.runs == nullptr, "ahead must have no runs", 1);
  call.require(l.rows == args.rows, "codes must have the tile's rows", l.rows);
  call.require(l.n == args.segments[0].depth, "codes must have the segment's depth", l.n);
  call.require(l.ordinary, "scales must be ordinary", 0);
  call.given(args.c, "c must not be null");
  call.given(args.segments[0].r, "r must not be null");
  UnpackArgs unpacked = l;
  unpacked.to = args.c;  // of which there is none
  unpacked.to_stride = 0;
  check_codes(call, code, DType::bf16, unpacked);
}

void check_flat_codes(const Kernels& k, Code code, const UnpackArgs& r, const FlatArgs& args) {
  const Call call{k, "flat_codes"};
  call.require(k.flat_codes[static_cast<int>(code)] != nullptr, "there must be a flat tile of codes", 1);
  call.in_range(args.rows, 1, k.flat_codes_rows, "rows must be at least 1 and at most flat_codes_rows");
  call.in_range(args.depth, 1, kMaxFlatCodesDepth, "depth must be at least 1 and at most kMaxFlatCodesDepth");
  call.require(args.width >= 1, "width must be at least 1", args.width);
  call.require(r.rows == args.depth, "codes must have the tile's depth", r.rows);
  call.require(r.n == args.width, "codes must have the tile's width", r.n);
  call.require(r.ordinary, "scales must be ordinary", 0);
  FlatArgs unpacked = args;
  unpacked.r = args.c;  // of which there is none
  unpacked.r_stride = 0;
  check_flat(call, unpacked, k.compute);
  UnpackArgs codes = r;
  codes.to = args.c;
  codes.to_stride = 0;
  check_codes(call, code, DType::bf16, codes);
}

void check_scales(const Kernels& k, ScaleType type, const ScaleArgs& args) {
  const Call call{k, "scales"};
  call.require(args.rows >= 0, "rows must be at least 0", args.rows);
  call.require(args.n >= 0, "n must be at least 0", args.n);
  call.given(args.to, "to must not be null");
  call.require(type != ScaleType::indexed || args.values, "indexed scales must have values", 0);
  if (args.rows > 0 && args.n > 0) call.given(args.from, "from must not be null");
}

void check_pack_lanes(const Kernels& k, const PackArgs& args) {
  check_pack({k, "pack_lanes"}, args, args.n_rows, args.n);
}

void check_pack_depth(const Kernels& k, const PackArgs& args) {
  check_pack({k, "pack_depth"}, args, args.n, args.n_rows);
}

}  // namespace moelora

#endif
