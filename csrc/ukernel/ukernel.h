// The micro-kernel contract. Every instruction set fills one `Kernels` per compute type; drivers call nothing else.
//
//   tile      C[i, j] = start + Σ_s Σ_p L_s[i][p] · R_s[p][j]   i < rows, j < vecs · lanes
//
// L   `rows` rows, `l_stride` bytes apart; each holds `depth` elements of the compute type with unit stride, in place
//     wherever the caller's tensor allows it. Not padded: nothing beyond `depth` elements is read.
// R   a packed panel. `pack` consecutive p stand side by side (2 for bf16 dot products, else 1):
//
//         p = 0,1      lane 0: p0 p1 | lane 1: p0 p1 | …      | lane panel_lanes-1: p0 p1
//         p = 2,3      lane 0: p2 p3 | lane 1: p2 p3 | …
//         …            ceil(depth / pack) such lines; a missing last p is zero, lanes beyond the data are zero
//
// C   row-major accumulators (fp32, or fp64 for fp64), `ldc` elements between rows. The whole tile is written: C has
//     room for every lane, whatever the number of valid ones. Start::zero overwrites C and never reads it.
//
// Each C element is one chain of multiply-adds (fused in all kernels but the portable ones) over p in ascending order,
// segment after segment, whatever the tile's shape. Start::resume goes on with the chain whose end C holds: results do
// not depend on how a driver cuts its blocks or passes. Start::add begins a new chain, and adds it to C at the end;
// fp32 and fp64 compute types only. Any 1 <= rows <= max_rows[vecs - 1] will do; edges in j are zero lanes; edges in p
// are the kernel's. (AMX: steps of 32 p of all segments first, then what is left of each; resumed at multiples of 32
// only.)
//
// To weave is to pack a panel between the products of a tile. Where a kernel set does, the first segment's panel may
// not exist yet: `rows` then holds what is to be packed, one row of lanes for every p, and the tile writes the panel
// while it multiplies. Only tiles as wide as they get, without a half vector, and an even depth; the compute type.
//
// To widen is to convert numbers that later tiles will read, between the products of a tile, for the same reasons. Any
// tile of a kernel set that widens does it.
//
// Two segments make LoRA part of the contraction: [x | s·xAᵀ] · [W | B]ᵀ.
//
//   dot_tile  C[j, i] (+)= Σ_s Σ_p L_s[i][p] · R_s[j][p]        i < rows, j < cols
//
// For few columns: both sides are unpacked rows of unit stride, C is transposed. Each C element sums lanes of p in a
// fixed order, so that it too does not depend on how blocks are cut (but differs from tile's by rounding). accumulate
// adds the call's sum to C, so that where passes are cut does count.
//
//   flat_tile C[i, j] = start + Σ_p L[i][p] · R[p][j]           i < rows, j < width, p < depth
//
// For few rows and any width: L's rows have unit stride along p, R's along j, both in place; R's are converted on the
// way, and where pack is 2, two of them woven. Not padded: nothing beyond `width` elements of C or R is touched.
// Start::zero or resume, at multiples of pack: the same chain as tile's.
//
// No allocation, no threads, no torch, no standard library here.
#pragma once

#include <cstdint>

#include "core/codes.h"
#include "core/dtype.h"

namespace moelora {

constexpr int kMaxTileVecs = 4;
constexpr int64_t kPeakValues = 2048;

enum class Start : uint8_t { zero, resume, add };

struct Segment {
  const void* l;     // [rows][depth], compute type
  int64_t l_stride;  // bytes between rows
  const void* r;     // packed panel
  int64_t depth;
  const void* rows = nullptr;  // [depth][lanes], to be packed on the way; r is not read then
  int64_t rows_stride = 0;     // bytes
  void* panel = nullptr;       // where they go, if anywhere
};

// Where __builtin_prefetch brings lines.
constexpr int kToL2 = 2, kToL1 = 3;

// Memory that will be wanted soon: `rows` runs of `bytes`, `stride` bytes apart, or each `offset` bytes behind its
// entry of `runs`. A kernel may fetch it along the way, into L1 or into L2.
struct Ahead {
  const void* from = nullptr;
  int64_t stride = 0, rows = 0, bytes = 0;
  const void* const* runs = nullptr;
  int64_t offset = 0;
  bool to_l1 = false;
};

// Rows of a panel that later tiles will read, to be packed on the way: `depth` rows of the widest tile's lanes, in the
// compute type. A multiple of `pack`, and at most the first segment's depth. Only where a kernel set weaves, by tiles
// as wide as they get, without a half vector, whose own panel is there.
struct Weave {
  const void* rows = nullptr;
  int64_t rows_stride = 0;  // bytes
  void* panel = nullptr;
  int64_t depth = 0;
};

constexpr int kWidenVecs = 4;

// bf16 that later tiles will read, to be converted to the compute type on the way: `rows` rows of `n` elements of unit
// stride, `stride` bytes apart, or each `offset` bytes behind its entry of `runs`. In `to`, rows are `to_stride` bytes
// apart, and each `unit` of elements begins `units_apart` bytes behind the one before. unit: kWidenVecs vectors, or the
// widest tile's lanes, which may go to a panel each; n is a multiple of it. Only where a kernel set widens, not beside
// an Ahead.
struct Widen {
  const void* from = nullptr;
  int64_t stride = 0, rows = 0, n = 0;
  const void* const* runs = nullptr;
  int64_t offset = 0;
  void* to = nullptr;
  int64_t to_stride = 0, unit = 0, units_apart = 0;
  int64_t ahead = 0;  // bytes: memory so far behind each element will be wanted soon
};

struct TileArgs {
  Segment segments[2];
  int n_segments;
  int rows, vecs;
  bool half;            // the last of the vecs is half as wide; only where Kernels::halves
  int64_t panel_lanes;  // lanes between two lines of R
  void* c;
  int64_t ldc;
  Start start;
  Ahead ahead;
  Weave weave = {};
  Widen widen = {};
};

constexpr int kMaxDotCols = 6;

struct DotSegment {
  const void* l;
  int64_t l_stride;  // bytes between rows
  const void* r;
  int64_t r_stride;
  int64_t depth;
};

struct DotArgs {
  DotSegment segments[2];
  int n_segments;
  int rows, cols;
  void* c;
  int64_t ldc;
  bool accumulate;
  Ahead ahead;
};

constexpr int kMaxFlatRows = 12;

// A flat tile may have codes for R, see Kernels::flat_codes: of so many steps.
constexpr int64_t kMaxFlatCodesDepth = 16;

struct FlatArgs {
  const void* l;
  int64_t l_stride;  // bytes between rows
  const void* r;
  int64_t r_stride;  // bytes between rows
  int64_t depth, width;
  int rows;
  void* c;
  int64_t ldc;
  Start start;
  Ahead ahead;
};

// Sources of the pack functions are rows: pointers to element `0` of each, `stride` elements between neighbours.
// Elements [first, first + n) of each row are taken and converted to the compute type.
struct PackArgs {
  const void* const* rows;
  int64_t n_rows;
  int64_t first, n;
  int64_t stride;
  void* panel;
  int64_t panel_lanes;
  int64_t panels_apart = 0;  // bytes; pack_depth goes on in the next panel where n is more than panel_lanes
};

// Columns [first, first + n) of some packed rows, in the compute type: rows `to_stride` bytes apart. As lines of a
// panel rows are p and columns its lanes: a line for every `pack` rows, a missing last row is zero.
struct UnpackArgs {
  const uint8_t* codes;  // of column 0 of the first row
  int64_t codes_stride;  // bytes between rows
  int64_t rows, first, n;
  const float* values;   // [16], of nibbles
  const float* scale;    // [rows][scale_stride]: of the groups that the columns are in, from the first of these on
  const float* zero;     // the same, or null
  int64_t scale_stride;  // elements
  int64_t group;         // columns that share a scale; where under 32, values are numbers of bf16
  bool ordinary;         // whether all scales are, so that no product overflows or is subnormal
  void* to;
  int64_t to_stride;
  int64_t ahead;  // bytes: codes so far behind these will be wanted soon; 0: none
};

// Scales or zero points, `stride` and `row_stride` elements apart, in fp32.
struct ScaleArgs {
  const void* from;
  int64_t rows, n, row_stride, stride;
  float factor;         // of e4m3 and indexed ones
  float offset;         // of indexed ones
  const float* values;  // [256], of these
  float* to;            // [rows][n]
  int64_t ahead;        // elements: those so far behind these will be wanted soon; 0: none
};

// Scales are ordinary if they are zero or of a size from the first to the second.
constexpr float kLeastOrdinary = 0x1p-100f, kMostOrdinary = 0x1p100f;
// The same with their bits moved up by one, over the sign.
constexpr uint32_t kLeastOrdinaryBits = uint32_t{127 - 100} << 24, kMostOrdinaryBits = uint32_t{127 + 100} << 24;

enum class Activation : uint8_t { silu, gelu, gelu_tanh };

struct GluArgs {
  Activation act;
  double alpha, limit, up_shift;  // limit = +inf: no clamp
  bool interleaved;
};

struct Kernels {
  const char* name;
  DType compute;               // element type of L and R
  int pack;                    // 1 or 2
  int lanes;                   // of one accumulator vector
  bool halves;                 // panels may end in half a vector
  int vecs;                    // widest tile
  int max_rows[kMaxTileVecs];  // tallest tile of 1, 2, … vecs
  bool weaves, widens;
  void (*tile)(const TileArgs&);
  int dot_rows[kMaxDotCols];  // tallest dot tile of 1, 2, … columns
  // Indexed by the storage type of the first segment's L, which is widened on the way; null where there is none.
  void (*dot_tile[kDTypes])(const DotArgs&);
  // Indexed by the storage type of R; null where there is none.
  void (*flat_tile[kDTypes])(const FlatArgs&);
  // The same for R of lines of a panel, of the compute type: [p/pack][j][pack], the last p of an odd depth zero. May be
  // null.
  void (*flat_lines)(const FlatArgs&);
  bool dots() const { return dot_tile[static_cast<int>(compute)] != nullptr; }
  int lane_step() const { return halves ? lanes / 2 : lanes; }
  int vectors(int64_t panel_lanes) const { return static_cast<int>((panel_lanes + lanes - 1) / lanes); }
  bool ends_in_half(int64_t panel_lanes) const { return panel_lanes % lanes != 0; }
  // As many multiply-adds as registers allow, on kPeakValues elements of the compute type: `rounds` rounds. Returns the
  // FLOPs; c: room for one vector of accumulators. What tiles, which load and store as well, are compared with.
  double (*peak)(void* c, const void* values, int64_t rounds);
  void (*release)();  // gives back per-thread state of the matrix unit once a thread is done; may be null

  // Indexed by the storage type of the source or destination; nullptr where this compute type does not take it.
  void (*pack_lanes[kDTypes])(const PackArgs&);  // rows are lanes of the panel, their elements run along p
  void (*pack_depth[kDTypes])(const PackArgs&);  // rows are p, their elements run along the lanes
  // dst[i] = src[i · stride], i < n, in the compute type
  void (*convert[kDTypes])(void* dst, const void* src, int64_t n, int64_t stride);
  // dst[i][j] = src[j][i], i < n, j < n_rows, in the compute type; dst rows are `ldd` apart. Rows scaled by scale[j].
  void (*transpose_in[kDTypes])(void* dst, int64_t ldd, const PackArgs& src, const void* scale);

  // to[i] = (value − zero) · scale, each operation rounded to fp32, then to the second index, the type that the weights
  // would have; null where this compute type does not take it. A zero may lose its sign. Every NaN among the scales is
  // one that stays NaN however it is rounded: `scales` gives no others.
  void (*unpack[kCodes][kDTypes])(const UnpackArgs&);
  void (*unpack_lines[kCodes][kDTypes])(const UnpackArgs&);  // where pack is 1, the same
  // to[i] = from[i · stride], · factor and + offset as their type has them, each rounded to fp32. Whether all are
  // ordinary.
  bool (*scales[kScaleTypes])(const ScaleArgs&);
  // The dot tile of what unpack would give, of numbers of bf16 and ordinary scales, to the bit; `to` is not used. False
  // if the codes or how they lie are not for it: then nothing is written. Null where there is none. The first segment's
  // l is not read. Both arguments say what will be wanted soon, a kernel fetches as either does.
  bool (*dot_codes[kCodes])(const UnpackArgs&, const DotArgs&);
  int dot_codes_cols;  // of so many columns at most
  // The same for the flat tile of the lines that unpack_lines would give, whose r is not read.
  bool (*flat_codes[kCodes])(const UnpackArgs&, const FlatArgs&);
  int flat_codes_rows;  // of so many rows at most

  // Accumulator rows. c, bias, acc: accumulator type.
  void (*transpose)(void* dst, int64_t ldd, const void* src, int64_t lds, int64_t rows, int64_t cols);
  void (*store[kDTypes])(void* dst, const void* c, const void* bias, double scale, int64_t n);  // scale · (c + bias)
  void (*add)(void* acc, const void* c, const void* bias, double scale, int64_t n);  // acc += scale · (c + bias)
  void (*add_row[kDTypes])(void* acc, const void* src, int64_t stride, double scale, int64_t n);  // acc += scale · src
  double (*dot[kDTypes])(const void* c, const void* x, int64_t stride, int64_t n);                // Σ c · x

  void (*glu[kDTypes])(void* y, const void* h, int64_t h_stride, int64_t width, const GluArgs&);
  void (*glu_backward[kDTypes])(void* dh, const void* dy, int64_t dy_stride, const void* h, int64_t h_stride,
                                int64_t width, const GluArgs&);
};

}  // namespace moelora
