// Every micro-kernel of every usable kernel set, on arrays that the caller provides.
#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "dispatch/table.h"
#include "ukernel/contract.h"

namespace moelora {
namespace {

struct BlockingValue {
  const char* name;
  int64_t Blocking::* member;
  int64_t least;
};

// The counts of rows switch an orientation off at 0.
constexpr BlockingValue kBlocking[] = {
    {"row_chunk", &Blocking::row_chunk, 1},
    {"dot_rows", &Blocking::dot_rows, 0},
    {"odd_rows", &Blocking::odd_rows, 0},
    {"dot_depth", &Blocking::dot_depth, 1},
    {"few_rows", &Blocking::few_rows, 0},
    {"flat_rows", &Blocking::flat_rows, 0},
    {"flat_bytes", &Blocking::flat_bytes, 1},
    {"thin_rows", &Blocking::thin_rows, 0},
    {"thin_depth", &Blocking::thin_depth, 1},
    {"thin_strip", &Blocking::thin_strip, 1},
    {"strip", &Blocking::strip, 1},
    {"packed_strips", &Blocking::packed_strips, 1},
    {"byte_strips", &Blocking::byte_strips, 1},
    {"packed_depth", &Blocking::packed_depth, 1},
    {"packed_flat_rows", &Blocking::packed_flat_rows, 0},
    {"chain", &Blocking::chain, 1},
    {"segment", &Blocking::segment, 1},
    {"depth", &Blocking::depth, 1},
    {"outputs", &Blocking::outputs, 1},
    {"combine_bytes", &Blocking::combine_bytes, 0},
    {"token_chunk", &Blocking::token_chunk, 1},
    {"outer_rows", &Blocking::outer_rows, 1},
    {"outer_cols", &Blocking::outer_cols, 1},
    {"outer_depth", &Blocking::outer_depth, 1},
};

py::dict blocking_of(const KernelChoice& choice) {
  py::dict values;
  for (const BlockingValue& v : kBlocking) values[v.name] = choice.blocking.*v.member;
  return values;
}

// The same kernels under other blocking, so that tests reach every loop with small shapes.
KernelChoice with_blocking(const KernelChoice& choice, const py::kwargs& changes) {
  KernelChoice changed = choice;
  for (const auto& [key, value] : changes) {
    const std::string wanted = py::cast<std::string>(key);
    const auto* v = std::find_if(std::begin(kBlocking), std::end(kBlocking),
                                 [&](const BlockingValue& b) { return wanted == b.name; });
    require(v != std::end(kBlocking), "no blocking value is called " + wanted);
    changed.blocking.*v->member = py::cast<int64_t>(value);
    require(changed.blocking.*v->member >= v->least, wanted + " must be at least " + std::to_string(v->least));
  }
  const Blocking& b = changed.blocking;
  const int64_t pack = choice.kernels->pack, widest = choice.kernels->lanes * choice.kernels->vecs;
  require(b.depth % pack == 0 && b.thin_depth % pack == 0 && b.packed_depth % pack == 0,
          "depth, thin_depth and packed_depth must be multiples of pack");
  require(std::max(b.dot_depth, b.depth) % std::min(b.dot_depth, b.depth) == 0,
          "one of depth and dot_depth must divide the other");
  require(b.chain_is_a_pass() && b.chain % b.thin_depth == 0, "chain must be depth or endless, thin_depth divide it");
  require(b.chain % std::min(b.packed_depth, b.chain) == 0, "packed_depth must divide chain, or not be below it");
  require(b.strip % widest == 0 && b.thin_strip % b.strip == 0,
          "strip must be a multiple of the widest tile's lanes, thin_strip one of strip");
  return changed;
}

// The storage types that one of the kernel's tables has a function for.
template <class F>
std::vector<std::string> filled(F const (&table)[kDTypes]) {
  std::vector<std::string> names;
  for (int t = 0; t < kDTypes; ++t)
    if (table[t]) names.push_back(name_of(static_cast<DType>(t)));
  return names;
}

std::vector<int> max_rows_of(const KernelChoice& choice) {
  return {choice.kernels->max_rows, choice.kernels->max_rows + choice.kernels->vecs};
}

// Empty where there is no dot tile.
std::vector<int> dot_rows_of(const KernelChoice& choice) {
  return {choice.kernels->dot_rows, choice.kernels->dot_rows + (choice.kernels->dots() ? kMaxDotCols : 0)};
}

// panel: [ceil(depth / pack)][lanes][pack]
Array check_panel(const Kernels& k, const py::array& panel, int64_t depth) {
  const Array a("panel", panel);
  a.dtype(k.compute).shape({ceil_div(depth, k.pack), -1, k.pack}).contiguous();
  require(a.size(1) % k.lane_step() == 0, "panel must have a multiple of " + std::to_string(k.lane_step()) +
                                              " lanes, got " + std::to_string(a.size(1)));
  return a;
}

// What a tile packs on the way: rows [depth, widest], the panel that they become.
struct Woven {
  const Array rows, panel;

  Woven(const Kernels& k, const std::pair<py::array, py::array>& arrays, int64_t most_depth)
      : rows("rows", arrays.first), panel(check_panel(k, arrays.second, rows.size(0))) {
    rows.dtype(k.compute).shape({-1, k.lanes * k.vecs}).unit_columns();
    require(k.weaves, std::string(k.name) + " does not weave");
    require(rows.size(0) % k.pack == 0 && rows.size(0) <= most_depth,
            "rows must be a multiple of " + std::to_string(k.pack) + ", at most " + std::to_string(most_depth) +
                ", got " + std::to_string(rows.size(0)));
    require(panel.size(1) == k.lanes * k.vecs, "panel must be as wide as rows");
  }
};

using ArrayPair = std::pair<py::array, py::array>;

// arrays: bf16 [rows, n], what they become [n / unit, rows, unit].  each: the source's rows one by one
Widen widen_of(const Kernels& k, const ArrayPair& arrays, std::vector<const void*>* each) {
  const Array from("widen", arrays.first), to("widened", arrays.second);
  require(k.widens, std::string(k.name) + " does not widen");
  from.dtype(DType::bf16).dims(2).unit_columns();
  to.dtype(k.compute).shape({-1, from.size(0), -1}).unit_columns();
  const int64_t unit = to.size(2), size = size_of(k.compute), stride = from.stride(0) * size_of(DType::bf16);
  require(unit == kWidenVecs * k.lanes || unit == k.vecs * k.lanes, "widened must have units of columns");
  require(to.size(0) * unit == from.size(1), "widened must be as large as widen");
  Widen widen{.from = from.data(),
              .stride = stride,
              .rows = from.size(0),
              .n = from.size(1),
              .to = to.mutable_data(),
              .to_stride = to.stride(1) * size,
              .unit = unit,
              .units_apart = to.stride(0) * size};
  if (each == nullptr) return widen;
  for (int64_t i = 0; i < widen.rows; ++i) each->push_back(static_cast<const char*>(from.data()) + i * stride);
  widen.from = nullptr;
  widen.runs = each->data();
  return widen;
}

// segments: (l [rows, depth], panel) once or twice;  c: [rows, lanes];  weave: (rows, panel), for other tiles;
// rows [depth, widest]: the first segment's panel is written from them;  widen: see widen_of, each: its rows one by one
// start: "zero", "resume" or "add"
void tile(const KernelChoice& choice, const std::vector<ArrayPair>& segments, const py::array& c,
          const std::string& start, const std::optional<ArrayPair>& weave,
          const std::optional<py::array>& rows_of_first, const std::optional<ArrayPair>& widen, bool each) {
  const Kernels& k = *choice.kernels;
  require(segments.size() == 1 || segments.size() == 2, "segments must be one or two pairs (l, panel)");
  const Array to("c", c);
  to.dtype(accumulator_type(k)).dims(2).unit_columns();
  const int64_t rows = to.size(0), lanes = to.size(1);
  require(lanes >= 1 && lanes <= k.vecs * k.lanes && lanes % k.lane_step() == 0,
          "c must have a multiple of " + std::to_string(k.lane_step()) + " columns, at most " +
              std::to_string(k.vecs * k.lanes) + ", got " + std::to_string(lanes));
  const int vecs = k.vectors(lanes), most = k.max_rows[vecs - 1];
  require(rows >= 1 && rows <= most,
          "c must have 1 to " + std::to_string(most) + " rows at this width, got " + std::to_string(rows));
  TileArgs args{};
  args.n_segments = static_cast<int>(segments.size());
  args.rows = static_cast<int>(rows);
  args.vecs = vecs;
  args.half = k.ends_in_half(lanes);
  for (size_t s = 0; s < segments.size(); ++s) {
    const Array l("l", segments[s].first);
    l.dtype(k.compute).shape({rows, -1}).unit_columns();
    const Array panel = check_panel(k, segments[s].second, l.size(1));
    require(panel.size(1) >= lanes, "panel must have a lane for every column of c");
    require(s == 0 || panel.size(1) == args.panel_lanes, "both panels must have the same number of lanes");
    args.panel_lanes = panel.size(1);
    args.segments[s] = {l.data(), l.stride(0) * size_of(k.compute), panel.data(), l.size(1)};
  }
  args.c = to.mutable_data();
  args.ldc = to.stride(0);
  require(start == "zero" || start == "resume" || start == "add", "start must be zero, resume or add, got " + start);
  require(start != "add" || k.compute != DType::bf16, std::string(k.name) + " does not add");
  args.start = start == "zero" ? Start::zero : start == "add" ? Start::add : Start::resume;
  require(!(weave || rows_of_first) || (lanes == k.vecs * k.lanes && args.panel_lanes == lanes),
          "only the widest tiles weave");
  require(!(weave && rows_of_first), "weave and rows exclude each other");
  if (weave) {
    const Woven woven(k, *weave, args.segments[0].depth / k.pack * k.pack);
    args.weave = {woven.rows.data(), woven.rows.stride(0) * size_of(k.compute), woven.panel.mutable_data(),
                  woven.rows.size(0)};
  }
  if (rows_of_first) {
    const Woven woven(k, {*rows_of_first, segments[0].second}, args.segments[0].depth);
    require(woven.rows.size(0) == args.segments[0].depth, "rows must be as many as l has columns");
    args.segments[0].rows = woven.rows.data();
    args.segments[0].rows_stride = woven.rows.stride(0) * size_of(k.compute);
    args.segments[0].panel = woven.panel.mutable_data();
  }
  std::vector<const void*> runs;
  if (widen) args.widen = widen_of(k, *widen, each ? &runs : nullptr);
  check(k, args);
  k.tile(args);
  if (k.release) k.release();
}

// segments: (l [rows, depth], r [cols, depth]) once or twice;  c: [cols, rows]
void dot_tile(const KernelChoice& choice, const std::vector<std::pair<py::array, py::array>>& segments,
              const py::array& c, bool accumulate) {
  const Kernels& k = *choice.kernels;
  require(k.dots(), std::string(k.name) + " has no dot tile");
  require(segments.size() == 1 || segments.size() == 2, "segments must be one or two pairs (l, r)");
  const Array to("c", c);
  to.dtype(accumulator_type(k)).dims(2).unit_columns();
  const int64_t cols = to.size(0), rows = to.size(1);
  require(cols >= 1 && cols <= kMaxDotCols, "c must have 1 to " + std::to_string(kMaxDotCols) + " rows");
  require(rows >= 1 && rows <= k.dot_rows[cols - 1],
          "c must have 1 to " + std::to_string(k.dot_rows[cols - 1]) + " columns with that many rows");
  DotArgs args{};
  args.n_segments = static_cast<int>(segments.size());
  args.rows = static_cast<int>(rows);
  args.cols = static_cast<int>(cols);
  void (*run)(const DotArgs&) = nullptr;
  DType of_first = k.compute;
  for (size_t s = 0; s < segments.size(); ++s) {
    const Array l("l", segments[s].first), r("r", segments[s].second);
    if (s == 0)
      run = for_storage(k.dot_tile, k, "l", of_first = l.dtype());
    else
      l.dtype(k.compute);
    l.shape({rows, -1}).unit_columns();
    r.dtype(k.compute).shape({cols, l.size(1)}).unit_columns();
    args.segments[s] = {l.data(), l.stride(0) * size_of(l.dtype()), r.data(), r.stride(0) * size_of(k.compute),
                        l.size(1)};
  }
  args.c = to.mutable_data();
  args.ldc = to.stride(0);
  args.accumulate = accumulate;
  check(k, args, of_first);
  run(args);
}

// l: [rows, depth], r: [depth, width] of any storage type that there is a kernel for;  c: [rows, width]
void flat_tile(const KernelChoice& choice, const py::array& l, const py::array& r, const py::array& c, bool resume) {
  const Kernels& k = *choice.kernels;
  const Array to("c", c), left("l", l), right("r", r);
  to.dtype(accumulator_type(k)).dims(2).unit_columns();
  require(to.size(0) >= 1 && to.size(0) <= kMaxFlatRows, "c must have 1 to " + std::to_string(kMaxFlatRows) + " rows");
  left.dtype(k.compute).shape({to.size(0), -1}).unit_columns();
  right.shape({left.size(1), to.size(1)}).unit_columns();
  const FlatArgs args{left.data(),
                      left.stride(0) * size_of(k.compute),
                      right.data(),
                      right.stride(0) * size_of(right.dtype()),
                      left.size(1),
                      to.size(1),
                      static_cast<int>(to.size(0)),
                      to.mutable_data(),
                      to.stride(0),
                      resume ? Start::resume : Start::zero,
                      {}};
  const auto run = for_storage(k.flat_tile, k, "r", right.dtype());
  check(k, args, right.dtype());
  run(args);
}

// Pointers to the rows of `source`, and the part [first, first + n) of each.
struct Source {
  std::vector<const void*> rows;
  PackArgs args;
};

Source source_rows(const Array& source, int64_t first, std::optional<int64_t> n) {
  source.dims(2);
  const int64_t count = n.value_or(source.size(1) - first);
  require(first >= 0 && count >= 0 && first + count <= source.size(1), "first and n must lie within source's columns");
  Source s;
  const Matrix m = source.matrix();
  for (int64_t i = 0; i < m.rows; ++i) s.rows.push_back(m.at(i, 0));
  s.args = {s.rows.data(), m.rows, first, count, m.col_stride, nullptr, 0};
  return s;
}

// source: [rows, ·], rows become lanes
void pack_lanes(const KernelChoice& choice, const py::array& panel, const py::array& source, int64_t first,
                std::optional<int64_t> n) {
  const Kernels& k = *choice.kernels;
  const Array from("source", source);
  Source s = source_rows(from, first, n);
  const Array to = check_panel(k, panel, s.args.n);
  require(to.size(1) >= s.args.n_rows, "panel must have a lane for every row of source");
  s.args.panel = to.mutable_data();
  s.args.panel_lanes = to.size(1);
  check_pack_lanes(k, s.args);
  for_storage(k.pack_lanes, k, "source", from.dtype())(s.args);
}

// source: [depth, ·], rows become p
void pack_depth(const KernelChoice& choice, const py::array& panel, const py::array& source, int64_t first,
                std::optional<int64_t> n) {
  const Kernels& k = *choice.kernels;
  const Array from("source", source);
  Source s = source_rows(from, first, n);
  const Array to = check_panel(k, panel, s.args.n_rows);
  require(to.size(1) >= s.args.n, "panel must have a lane for every column of source");
  s.args.panel = to.mutable_data();
  s.args.panel_lanes = to.size(1);
  check_pack_depth(k, s.args);
  for_storage(k.pack_depth, k, "source", from.dtype())(s.args);
}

void convert(const KernelChoice& choice, const py::array& dst, const py::array& source) {
  const Kernels& k = *choice.kernels;
  const Array to("dst", dst), from("source", source);
  to.dims(1).dtype(k.compute).unit_columns();
  from.shape({to.size(0)});
  for_storage(k.convert, k, "source", from.dtype())(to.mutable_data(), from.data(), to.size(0), from.stride(0));
}

// dst: [n, rows] = (scale · source[:, first : first + n])ᵀ, scale: [rows]
void transpose_in(const KernelChoice& choice, const py::array& dst, const py::array& source, const OptionalArray& scale,
                  int64_t first, std::optional<int64_t> n) {
  const Kernels& k = *choice.kernels;
  const Array to("dst", dst), from("source", source);
  const Source s = source_rows(from, first, n);
  to.shape({s.args.n, s.args.n_rows}).dtype(k.compute).unit_columns();
  const void* factors = nullptr;
  if (scale) factors = Array("scale", *scale).dtype(accumulator_type(k)).shape({s.args.n_rows}).unit_columns().data();
  for_storage(k.transpose_in, k, "source", from.dtype())(to.mutable_data(), to.stride(0), s.args, factors);
}

void transpose(const KernelChoice& choice, const py::array& dst, const py::array& source) {
  const Kernels& k = *choice.kernels;
  const Array to("dst", dst), from("source", source);
  from.dims(2).dtype(accumulator_type(k)).unit_columns();
  to.shape({from.size(1), from.size(0)}).dtype(accumulator_type(k)).unit_columns();
  k.transpose(to.mutable_data(), to.stride(0), from.data(), from.stride(0), from.size(0), from.size(1));
}

// [n] accumulators, or null where there is no bias.
const void* accumulators(const Kernels& k, const char* name, const OptionalArray& array, int64_t n) {
  return array ? Array(name, *array).dtype(accumulator_type(k)).shape({n}).unit_columns().data() : nullptr;
}

void store(const KernelChoice& choice, const py::array& dst, const py::array& c, const OptionalArray& bias,
           double scale) {
  const Kernels& k = *choice.kernels;
  const Array to("dst", dst);
  const int64_t n = to.dims(1).unit_columns().size(0);
  for_storage(k.store, k, "dst", to.dtype())(to.mutable_data(), accumulators(k, "c", c, n),
                                             accumulators(k, "bias", bias, n), scale, n);
}

void add(const KernelChoice& choice, const py::array& acc, const py::array& c, const OptionalArray& bias,
         double scale) {
  const Kernels& k = *choice.kernels;
  const Array to("acc", acc);
  const int64_t n = to.dims(1).dtype(accumulator_type(k)).unit_columns().size(0);
  k.add(to.mutable_data(), accumulators(k, "c", c, n), accumulators(k, "bias", bias, n), scale, n);
}

void add_row(const KernelChoice& choice, const py::array& acc, const py::array& source, double scale) {
  const Kernels& k = *choice.kernels;
  const Array to("acc", acc), from("source", source);
  const int64_t n = to.dims(1).dtype(accumulator_type(k)).unit_columns().size(0);
  from.shape({n});
  for_storage(k.add_row, k, "source", from.dtype())(to.mutable_data(), from.data(), from.stride(0), scale, n);
}

double dot(const KernelChoice& choice, const py::array& c, const py::array& x) {
  const Kernels& k = *choice.kernels;
  const Array from("x", x);
  const int64_t n = from.dims(1).size(0);
  return for_storage(k.dot, k, "x", from.dtype())(accumulators(k, "c", c, n), from.data(), from.stride(0), n);
}

// y: [width], h: [2 · width]
void glu_row(const KernelChoice& choice, const py::array& y, const py::array& h, const std::string& act, double alpha,
             std::optional<double> limit, double up_shift, bool interleaved) {
  const Kernels& k = *choice.kernels;
  const Array to("y", y), from("h", h);
  const int64_t width = to.dims(1).unit_columns().size(0);
  from.dtype(to.dtype()).shape({2 * width});
  for_storage(k.glu, k, "h", from.dtype())(to.mutable_data(), from.data(), from.stride(0), width,
                                           glu_args(act, alpha, limit, up_shift, interleaved));
}

// dh, h: [2 · width], dy: [width]
void glu_backward_row(const KernelChoice& choice, const py::array& dh, const py::array& dy, const py::array& h,
                      const std::string& act, double alpha, std::optional<double> limit, double up_shift,
                      bool interleaved) {
  const Kernels& k = *choice.kernels;
  const Array to("dh", dh), grad("dy", dy), from("h", h);
  const int64_t width = grad.dims(1).size(0);
  from.shape({2 * width});
  to.dtype(from.dtype()).shape({2 * width}).unit_columns();
  grad.dtype(from.dtype());
  for_storage(k.glu_backward, k, "h", from.dtype())(to.mutable_data(), grad.data(), grad.stride(0), from.data(),
                                                    from.stride(0), width,
                                                    glu_args(act, alpha, limit, up_shift, interleaved));
}

}  // namespace

void bind_kernels(py::module_& m) {
  using namespace py::literals;
  // Local: tests load a second build of this module beside the installed one.
  py::class_<KernelChoice>(m, "KernelSet", py::module_local(),
                           "One instruction set's kernels; the methods write into given arrays.")
      .def_property_readonly("name", [](const KernelChoice& c) { return c.kernels->name; })
      .def_property_readonly("isa", [](const KernelChoice& c) { return name_of(c.isa); })
      .def_property_readonly("compute", [](const KernelChoice& c) { return name_of(c.kernels->compute); })
      .def_property_readonly("pack", [](const KernelChoice& c) { return c.kernels->pack; })
      .def_property_readonly("lanes", [](const KernelChoice& c) { return c.kernels->lanes; })
      .def_property_readonly("lane_step", [](const KernelChoice& c) { return c.kernels->lane_step(); })
      .def_property_readonly("weaves", [](const KernelChoice& c) { return c.kernels->weaves; })
      .def_property_readonly("widens", [](const KernelChoice& c) { return c.kernels->widens; })
      .def_property_readonly("vecs", [](const KernelChoice& c) { return c.kernels->vecs; })
      .def_property_readonly("max_rows", max_rows_of)
      .def_property_readonly("dot_rows", dot_rows_of)
      .def_property_readonly("flat_storage", [](const KernelChoice& c) { return filled(c.kernels->flat_tile); })
      .def_property_readonly("dot_codes_cols", [](const KernelChoice& c) { return c.kernels->dot_codes_cols; })
      .def_property_readonly("flat_codes_rows", [](const KernelChoice& c) { return c.kernels->flat_codes_rows; })
      .def_property_readonly("dot_storage", [](const KernelChoice& c) { return filled(c.kernels->dot_tile); })
      .def_property_readonly("storage", [](const KernelChoice& c) { return filled(c.kernels->pack_lanes); })
      .def_property_readonly("blocking", blocking_of)
      .def("with_blocking", with_blocking)
      .def("tile", tile, "segments"_a, "c"_a, "start"_a = "zero", "weave"_a = py::none(), "rows"_a = py::none(),
           "widen"_a = py::none(), "each"_a = false)
      .def("dot_tile", dot_tile, "segments"_a, "c"_a, "accumulate"_a = false)
      .def("flat_tile", flat_tile, "l"_a, "r"_a, "c"_a, "resume"_a = false)
      .def("pack_lanes", pack_lanes, "panel"_a, "source"_a, "first"_a = 0, "n"_a = py::none())
      .def("pack_depth", pack_depth, "panel"_a, "source"_a, "first"_a = 0, "n"_a = py::none())
      .def("convert", convert, "dst"_a, "source"_a)
      .def("transpose_in", transpose_in, "dst"_a, "source"_a, "scale"_a = py::none(), "first"_a = 0, "n"_a = py::none())
      .def("transpose", transpose, "dst"_a, "source"_a)
      .def("store", store, "dst"_a, "c"_a, "bias"_a = py::none(), "scale"_a = 1.0)
      .def("add", add, "acc"_a, "c"_a, "bias"_a = py::none(), "scale"_a = 1.0)
      .def("add_row", add_row, "acc"_a, "source"_a, "scale"_a = 1.0)
      .def("dot", dot, "c"_a, "x"_a)
      .def("glu", glu_row, "y"_a, "h"_a, "act"_a = "silu", "alpha"_a = 1.0, "limit"_a = py::none(), "up_shift"_a = 0.0,
           "interleaved"_a = false)
      .def("glu_backward", glu_backward_row, "dh"_a, "dy"_a, "h"_a, "act"_a = "silu", "alpha"_a = 1.0,
           "limit"_a = py::none(), "up_shift"_a = 0.0, "interleaved"_a = false);
  m.def("kernel_sets", usable_kernels, "Every kernel set that this machine can run, best first.");
}

}  // namespace moelora
