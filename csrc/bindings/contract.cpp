// Calls that break the micro-kernels' contract, for the tests of its checks; nothing is computed.
#include "ukernel/contract.h"

#include <string>

#include "bindings/arrays.h"
#include "dispatch/table.h"

namespace moelora {
namespace {

alignas(64) char memory[64];
const void* const memory_runs[] = {memory};

// A tile that keeps the contract, of one row and one vector.
TileArgs small_tile(const Kernels& k) {
  TileArgs args{};
  args.segments[0] = args.segments[1] = {memory, 64, memory, 2};
  args.n_segments = args.rows = args.vecs = 1;
  args.panel_lanes = args.ldc = k.lanes;
  args.c = memory;
  return args;
}

// The widest one, which weaves for others.
TileArgs weaving_tile(const Kernels& k) {
  TileArgs args = small_tile(k);
  args.vecs = k.vecs;
  args.panel_lanes = args.ldc = int64_t{k.lanes} * k.vecs;
  args.weave = {memory, 64, memory, 2};
  return args;
}

// One that widens for others.
TileArgs widening_tile(const Kernels& k) {
  TileArgs args = small_tile(k);
  const int64_t unit = int64_t{k.lanes} * k.vecs;
  args.widen = {.from = memory, .stride = 64, .rows = 1, .n = unit, .to = memory, .to_stride = 64, .unit = unit};
  return args;
}

TileArgs tile_before(const Kernels& k, const std::string& change) {
  if (change.starts_with("widen")) return widening_tile(k);
  return change.starts_with("weave") || change.starts_with("own") ? weaving_tile(k) : small_tile(k);
}

void change_widening(TileArgs& args, const std::string& change, int64_t to) {
  if (change == "widen.rows") args.widen.rows = to;
  if (change == "widen.n") args.widen.n = to;
  if (change == "widen.unit") args.widen.unit = to;
  if (change == "widen.from") args.widen.from = nullptr;
  if (change == "widen.to") args.widen.to = to ? memory + to : nullptr;
  if (change == "widen.both") args.widen.runs = memory_runs;
  if (change == "widen.apart") args.widen.units_apart = to;
  if (change == "widen.ahead") args.ahead = {memory, 64, 1, 64};
}

void check_tile(const KernelChoice& choice, const std::string& change, int64_t to) {
  const Kernels& k = *choice.kernels;
  TileArgs args = tile_before(k, change);
  change_widening(args, change, to);
  if (change == "weave.vecs") args.vecs = static_cast<int>(to);
  if (change == "weave.half") args.half = to != 0;
  if (change == "weave.depth") args.weave.depth = to;
  if (change == "weave.rows") args.weave.rows = nullptr;
  if (change == "weave.panel") args.weave.panel = nullptr;
  if (change == "weave.own") args.segments[0].rows = memory;
  if (change.starts_with("own")) args.weave = {}, args.segments[0].rows = memory;
  if (change == "own.depth") args.segments[0].depth = to;
  if (change == "own.second") args.n_segments = 2, args.segments[1].rows = memory;
  if (change == "n_segments") args.n_segments = static_cast<int>(to);
  if (change == "vecs") args.vecs = static_cast<int>(to);
  if (change == "rows") args.rows = static_cast<int>(to);
  if (change == "half") args.half = to != 0;
  if (change == "panel_lanes") args.panel_lanes = to;
  if (change == "ldc") args.ldc = to, args.rows = 2;
  if (change == "c") args.c = to ? memory + to : nullptr;
  if (change == "depth") args.segments[0].depth = to;
  if (change == "l") args.segments[0].l = to ? memory + to : nullptr;
  if (change == "r") args.segments[0].r = to ? memory + to : nullptr;
  if (change == "start") args.start = Start::add;
  if (change == "ahead.rows") args.ahead.rows = to;
  if (change == "ahead.both") args.ahead = {memory, 64, 1, 64, memory_runs, 0};
  check(k, args);
}

void check_dot(const KernelChoice& choice, const std::string& change, int64_t to) {
  DotArgs args{};
  args.segments[0] = args.segments[1] = {memory, 64, memory, 64, 2};
  args.n_segments = args.rows = args.cols = 1;
  args.c = memory;
  args.ldc = 1;
  if (change == "n_segments") args.n_segments = static_cast<int>(to);
  if (change == "rows") args.rows = static_cast<int>(to);
  if (change == "cols") args.cols = static_cast<int>(to);
  if (change == "ldc") args.ldc = to, args.cols = 2;
  if (change == "c") args.c = to ? memory + to : nullptr;
  if (change == "depth") args.segments[0].depth = to;
  if (change == "l") args.segments[0].l = to ? memory + to : nullptr;
  if (change == "r") args.segments[0].r = to ? memory + to : nullptr;
  if (change == "ahead.runs") args.ahead = {nullptr, 0, 1, 64, memory_runs, 0};
  check(*choice.kernels, args, choice.kernels->compute);
}

void check_flat(const KernelChoice& choice, bool lines, const std::string& change, int64_t to) {
  FlatArgs args{memory, 64, memory, 64, 2, 2, 1, memory, 2, Start::zero, {}};
  if (change == "rows") args.rows = static_cast<int>(to);
  if (change == "width") args.width = to;
  if (change == "depth") args.depth = to;
  if (change == "start") args.start = Start::add;
  if (change == "ldc") args.ldc = to, args.rows = 2;
  if (change == "c") args.c = to ? memory + to : nullptr;
  if (change == "l") args.l = to ? memory + to : nullptr;
  if (change == "r") args.r = to ? memory + to : nullptr;
  lines ? check_flat_lines(*choice.kernels, args) : check(*choice.kernels, args, choice.kernels->compute);
}

void check_pack(const KernelChoice& choice, bool lanes, const std::string& change, int64_t to) {
  const void* rows[2] = {memory, memory};
  PackArgs args{rows, 2, 0, 2, 1, memory, choice.kernels->lanes};
  if (change == "n_rows") args.n_rows = to;
  if (change == "first") args.first = to;
  if (change == "n") args.n = to;
  if (change == "panel_lanes") args.panel_lanes = to;
  if (change == "panel") args.panel = nullptr;
  if (change == "rows") args.rows = nullptr;
  if (change == "row") rows[1] = nullptr;
  lanes ? check_pack_lanes(*choice.kernels, args) : check_pack_depth(*choice.kernels, args);
}

void check_unpacking(const KernelChoice& choice, bool lines, const std::string& change, int64_t to) {
  static const float values[16] = {};
  float scale[6] = {1, 1, 1, 1, 1, 1};
  const Kernels& k = *choice.kernels;
  Code code = Code::nibbles_low;
  UnpackArgs args{
      reinterpret_cast<const uint8_t*>(memory), 8, 1, 0, 4, values, scale, nullptr, 2, 32, true, memory, 64, 0};
  if (change == "rows") args.rows = to;
  if (change == "first") args.first = to;
  if (change == "n") args.n = to;
  if (change == "group") args.group = to;
  if (change == "codes") args.codes = nullptr;
  if (change == "values") args.values = nullptr;
  if (change == "scale") args.scale = nullptr;
  if (change == "scale_stride") args.scale_stride = to, args.rows = 2;
  if (change == "zero") args.zero = scale, code = Code::int8;
  if (change == "to") args.to = to ? memory + to : nullptr;
  if (change == "to_stride") args.to_stride = to, args.rows = 3;
  if (change == "ordinary") scale[0] = 0x1p-120f;
  if (change == "nan") scale[0] = bit_cast<float>(0x7fffffffu), args.ordinary = false;
  const DType numbers = change == "numbers" ? DType::f64 : DType::bf16;
  lines ? check_unpack_lines(k, code, numbers, args) : check_unpack(k, code, numbers, args);
}

void check_dotting_codes(const KernelChoice& choice, const std::string& change, int64_t to) {
  float scale[2] = {1, 1};
  const Kernels& k = *choice.kernels;
  DotArgs args{};
  args.segments[0] = {nullptr, 0, memory, 64, 4};
  args.n_segments = args.rows = args.cols = 1;
  args.c = memory;
  args.ldc = 1;
  UnpackArgs codes{
      reinterpret_cast<const uint8_t*>(memory), 8, 1, 0, 4, nullptr, scale, nullptr, 2, 32, true, nullptr, 0, 0};
  if (change == "rows") args.rows = static_cast<int>(to);
  if (change == "cols") args.cols = static_cast<int>(to);
  if (change == "codes.rows") codes.rows = to;
  if (change == "codes.n") codes.n = to;
  if (change == "codes") codes.codes = nullptr;
  if (change == "ordinary") codes.ordinary = false;
  if (change == "scale") scale[0] = 0x1p-120f;
  if (change == "r") args.segments[0].r = nullptr;
  if (change == "c") args.c = nullptr;
  check_dot_codes(k, Code::int8, codes, args);
}

void check_flattening_codes(const KernelChoice& choice, const std::string& change, int64_t to) {
  float scale[2] = {1, 1};
  const Kernels& k = *choice.kernels;
  FlatArgs args{memory, 64, nullptr, 0, 2, 4, 1, memory, 4, Start::zero, {}};
  UnpackArgs codes{
      reinterpret_cast<const uint8_t*>(memory), 8, 2, 0, 4, nullptr, scale, nullptr, 1, 32, true, nullptr, 0, 0};
  if (change == "rows") args.rows = static_cast<int>(to);
  if (change == "depth") args.depth = codes.rows = to;
  if (change == "codes.rows") codes.rows = to;
  if (change == "codes.n") codes.n = to;
  if (change == "codes") codes.codes = nullptr;
  if (change == "ordinary") codes.ordinary = false;
  if (change == "scale") scale[0] = 0x1p-120f;
  if (change == "l") args.l = nullptr;
  if (change == "c") args.c = nullptr;
  check_flat_codes(k, Code::int8, codes, args);
}

void check_reading_scales(const KernelChoice& choice, const std::string& change, int64_t to) {
  ScaleArgs args{memory, 1, 1, 1, 1, 1.0f, 0.0f, nullptr, reinterpret_cast<float*>(memory), 0};
  if (change == "rows") args.rows = to;
  if (change == "n") args.n = to;
  if (change == "from") args.from = nullptr;
  if (change == "to") args.to = nullptr;
  check_scales(*choice.kernels, change == "values" ? ScaleType::indexed : ScaleType::f32, args);
}

}  // namespace

void bind_contract(py::module_& m) {
  m.def(
      "check_contract",
      [](const KernelChoice& choice, const std::string& kernel, const std::string& change, int64_t to) {
        if (kernel == "tile") return check_tile(choice, change, to);
        if (kernel == "dot_tile") return check_dot(choice, change, to);
        if (kernel == "flat_tile" || kernel == "flat_lines")
          return check_flat(choice, kernel == "flat_lines", change, to);
        if (kernel == "unpack" || kernel == "unpack_lines")
          return check_unpacking(choice, kernel == "unpack_lines", change, to);
        if (kernel == "dot_codes") return check_dotting_codes(choice, change, to);
        if (kernel == "flat_codes") return check_flattening_codes(choice, change, to);
        if (kernel == "scales") return check_reading_scales(choice, change, to);
        require(kernel == "pack_lanes" || kernel == "pack_depth", "no kernel is called " + kernel);
        check_pack(choice, kernel == "pack_lanes", change, to);
      },
      py::arg("kernels"), py::arg("kernel"), py::arg("change") = "", py::arg("to") = 0,
      "Checks the arguments of a small call, one of them changed; sanitized builds abort where it breaks the "
      "contract.");
}

}  // namespace moelora
