// bf16 tiles of AMX: TDPBF16PS multiplies 16 rows × 32 p by 32 p × 16 lanes into fp32 accumulators.
//
// A is 16 rows of L in place, B is 16 lines of R (16 lanes of each) in place: a line's pairs of p are B's rows. Edges
// in rows and in p are shapes of the tile configuration. Only a segment of odd depth has its last p copied: tile rows
// are whole pairs, and nothing beyond L's depth may be read.
//
//   register      0 1 2 3                                  4      5      6            7
//   square block  C of 2 × 2: rows below rows, lanes       A      A      B            B
//   strip         C of up to 4 tiles of one row or column  A      B      A, rest of p  B, rest of p
//
// Every element of C adds up the same way in all blocks: segment after segment in steps of 32 p, then what is left of
// each segment. Drivers cut p at multiples of 32.
#include <immintrin.h>

#include "ukernel/kernel_sets.h"
#include "ukernel/tile.inl"

namespace {

using moelora::TileArgs;

constexpr int kTile = 16;          // rows of A and C, lanes of B and C, pairs of p
constexpr int kTileBytes = 64;     // of a row of a full tile
constexpr int kStep = 32;          // p of a full A or B
constexpr int64_t kPairBytes = 4;  // two bf16 of one lane
constexpr int kStrip = 4;          // tiles
constexpr int kMaxRows = 256;

// --- instructions

template <int T, int Offset = 0>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd %c3(%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T), "i"(Offset) : "memory");
}
template <int T, int Offset = 0>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, %c3(%0,%1,1)" ::"r"(to), "r"(stride), "i"(T), "i"(Offset) : "memory");
}
template <int T>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
inline void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// --- configuration

struct Shape {
  uint8_t rows;        // of the (upper) tiles
  uint8_t rows_below;  // of the lower ones; 0: a strip
  uint8_t pairs;       // of p in registers 4 to 7 of a square block
  uint8_t rest;        // pairs of p in registers 6 and 7 of a strip
};

// The configuration that this thread's tiles have; 0: none. Loading one is slow and clears all tiles.
thread_local uint32_t configured = 0;

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

void configure(Shape shape) {
  const uint32_t wanted = moelora::bit_cast<uint32_t>(shape);
  if (wanted == configured) return;
  Config config;
  const bool square = shape.rows_below != 0;
  for (int t = 0; t < 4; ++t) config.set(t, square && t >= 2 ? shape.rows_below : shape.rows, kTileBytes);
  if (square) {
    config.set(4, shape.rows, shape.pairs * 4);
    config.set(5, shape.rows_below, shape.pairs * 4);
    config.set(6, shape.pairs, kTileBytes);
    config.set(7, shape.pairs, kTileBytes);
  } else {
    config.set(4, shape.rows, kTileBytes);
    config.set(5, kTile, kTileBytes);
    if (shape.rest) {
      config.set(6, shape.rows, shape.rest * 4);
      config.set(7, shape.rest, kTileBytes);
    }
  }
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  configured = wanted;
}

void release() {
  if (configured == 0) return;
  asm volatile("tilerelease" ::: "memory");
  configured = 0;
}

// --- the contraction as runs of equal steps

struct Run {
  const char *l, *r;
  int64_t l_stride;
  int64_t steps;
  int pairs;  // of p in a step
};

struct Job {
  const TileArgs& args;
  int64_t line, ldc;  // bytes between lines of R, rows of C
  Fetcher ahead;
  Run runs[4];
  int n_runs = 0;

  char* c(int row, int lane) const {
    return static_cast<char*>(args.c) + row * ldc + lane * static_cast<int64_t>(sizeof(float));
  }
};

// [rows][kStep], zeros behind the first n elements of a row
void pad_rows(char* padded, const char* l, int64_t l_stride, int rows, int64_t n) {
  for (int i = 0; i < rows; ++i)
    _mm512_store_si512(padded + i * kTileBytes, _mm512_maskz_loadu_epi16((1u << n) - 1u, l + i * l_stride));
}

// padded: room for the last p of both segments
void find_runs(Job& job, char* padded) {
  for (int s = 0; s < job.args.n_segments; ++s) {
    const moelora::Segment& from = job.args.segments[s];
    if (from.depth >= kStep)
      job.runs[job.n_runs++] = {static_cast<const char*>(from.l), static_cast<const char*>(from.r), from.l_stride,
                                from.depth / kStep, kTile};
  }
  for (int s = 0; s < job.args.n_segments; ++s) {
    const moelora::Segment& from = job.args.segments[s];
    const int64_t steps = from.depth / kStep, rest = from.depth % kStep;
    if (rest == 0) continue;
    Run run{static_cast<const char*>(from.l) + steps * kTileBytes,
            static_cast<const char*>(from.r) + steps * kTile * job.line, from.l_stride, 1,
            static_cast<int>(rest + 1) / 2};
    if (rest % 2 != 0) {
      char* copy = padded + s * kMaxRows * kTileBytes;
      pad_rows(copy, run.l, run.l_stride, job.args.rows, rest);
      run.l = copy;
      run.l_stride = kTileBytes;
    }
    job.runs[job.n_runs++] = run;
  }
  if (job.n_runs == 0) job.runs[job.n_runs++] = {nullptr, nullptr, 0, 0, kTile};
}

// --- blocks: tiles of C from (row, lane) on, runs [first, last); `accumulate` starts from what C holds

// C: [rows + rows_below][32 lanes]
void square_block(Job& job, const Run* first, const Run* last, int row, int lane, bool accumulate) {
  const int64_t ldc = job.ldc, line = job.line;
  char *c = job.c(row, lane), *below = c + kTile * ldc;
  if (accumulate) {
    load<0>(c, ldc);
    load<1, kTileBytes>(c, ldc);
    load<2>(below, ldc);
    load<3, kTileBytes>(below, ldc);
  } else {
    zero<0>();
    zero<1>();
    zero<2>();
    zero<3>();
  }
  for (; first < last; ++first) {
    const int64_t stride = first->l_stride;
    const char *a = first->l + row * stride, *a_below = a + kTile * stride, *b = first->r + lane * kPairBytes;
    for (int64_t step = 0; step < first->steps; ++step) {
      load<6>(b, line);
      load<4>(a, stride);
      multiply<0, 4, 6>();
      load<7, kTileBytes>(b, line);
      multiply<1, 4, 7>();
      load<5>(a_below, stride);
      multiply<2, 5, 6>();
      multiply<3, 5, 7>();
      a += kTileBytes;
      a_below += kTileBytes;
      b += kTile * line;
      job.ahead.step();
    }
  }
  store<0>(c, ldc);
  store<1, kTileBytes>(c, ldc);
  store<2>(below, ldc);
  store<3, kTileBytes>(below, ldc);
}

// Strips are N tiles, one below the other if Down, else side by side. T counts them.
template <int N, bool Down, int T = 0>
inline void start_strip(char* c, int64_t ldc, bool accumulate) {
  if constexpr (T < N) {
    if (accumulate)
      load<T>(c, ldc);
    else
      zero<T>();
    start_strip<N, Down, T + 1>(c + (Down ? kTile * ldc : kTileBytes), ldc, accumulate);
  }
}
template <int N, bool Down, int A, int B, int T = 0>
inline void step_strip(const char* a, int64_t stride, const char* b, int64_t line) {
  if constexpr (T < N) {
    if constexpr (T == 0 || Down) load<A>(a + T * kTile * stride, stride);
    if constexpr (T == 0 || !Down) load<B, T * kTileBytes>(b, line);
    multiply<T, A, B>();
    step_strip<N, Down, A, B, T + 1>(a, stride, b, line);
  }
}
template <int N, bool Down, int T = 0>
inline void store_strip(char* c, int64_t ldc) {
  if constexpr (T < N) {
    store<T>(c, ldc);
    store_strip<N, Down, T + 1>(c + (Down ? kTile * ldc : kTileBytes), ldc);
  }
}

template <int N, bool Down>
void strip_block(Job& job, const Run* first, const Run* last, int row, int lane, bool accumulate) {
  char* c = job.c(row, lane);
  start_strip<N, Down>(c, job.ldc, accumulate);
  for (; first < last; ++first) {
    const int64_t stride = first->l_stride;
    const char *a = first->l + row * stride, *b = first->r + lane * kPairBytes;
    if (first->pairs != kTile) {
      step_strip<N, Down, 6, 7>(a, stride, b, job.line);
      continue;
    }
    for (int64_t step = 0; step < first->steps; ++step, a += kTileBytes, b += kTile * job.line) {
      step_strip<N, Down, 4, 5>(a, stride, b, job.line);
      job.ahead.step();
    }
  }
  store_strip<N, Down>(c, job.ldc);
}

// --- blocks that cover the tile

// Two rows of tiles × two of lanes. A rest of p needs another shape of A and B than the steps before it: it goes over
// all blocks once these are through, so that the configuration changes once for all of them.
void squares(Job& job, int rows, int lanes) {
  const Run *last, *end = job.runs + job.n_runs;
  bool accumulate = job.args.start == moelora::Start::resume;
  for (const Run* first = job.runs; first < end; first = last, accumulate = true) {
    for (last = first + 1; last < end && last->pairs == first->pairs;) ++last;
    for (int row = 0; row < rows; row += 2 * kTile) {
      const int below = rows - row - kTile;
      configure({kTile, static_cast<uint8_t>(below < kTile ? below : kTile), static_cast<uint8_t>(first->pairs), 0});
      for (int lane = 0; lane < lanes; lane += 2 * kTile) square_block(job, first, last, row, lane, accumulate);
    }
  }
}

// n tiles of `rows` rows each. The configuration has room for one shape of rest: two segments with two take two passes.
template <bool Down>
void strip(Job& job, int row, int lane, int n, int rows) {
  constexpr void (*kBlocks[])(Job&, const Run*, const Run*, int, int, bool) = {
      strip_block<1, Down>, strip_block<2, Down>, strip_block<3, Down>, strip_block<4, Down>};
  const Run *last, *end = job.runs + job.n_runs;
  bool accumulate = job.args.start == moelora::Start::resume;
  for (const Run* first = job.runs; first < end; first = last, accumulate = true) {
    int rest = 0;
    for (last = first; last < end; ++last) {
      if (last->pairs == kTile) continue;
      if (rest != 0 && last->pairs != rest) break;
      rest = last->pairs;
    }
    configure({static_cast<uint8_t>(rows), 0, 0, static_cast<uint8_t>(rest)});
    kBlocks[n - 1](job, first, last, row, lane, accumulate);
  }
}

// All rows of one tile of lanes.
void column(Job& job, int rows, int lane) {
  int row = 0;
  for (int n; (n = (rows - row) / kTile) > 0; row += n * kTile) {
    if (n > kStrip) n = kStrip;
    strip<true>(job, row, lane, n, kTile);
  }
  if (row < rows) strip<true>(job, row, lane, 1, rows - row);
}

void tile(const TileArgs& args) {
  alignas(64) char padded[2 * kMaxRows * kTileBytes];
  // A block has at most four tiles: at least as many steps as the fetcher is told.
  const int64_t blocks = (static_cast<int64_t>(args.rows) * args.vecs + 4 * kTile - 1) / (4 * kTile);
  Job job{args,
          args.panel_lanes * kPairBytes,
          args.ldc * static_cast<int64_t>(sizeof(float)),
          Fetcher(args.ahead, blocks * (args.segments[0].depth / kStep)),
          {}};
  find_runs(job, padded);
  if (args.vecs == 1) return column(job, args.rows, 0);
  const int odd = args.rows % (2 * kTile), paired = odd > kTile ? args.rows : args.rows - odd;
  squares(job, paired, args.vecs / 2 * 2 * kTile);
  if (args.vecs % 2 != 0) column(job, paired, (args.vecs - 1) * kTile);
  if (paired < args.rows) strip<false>(job, paired, 0, args.vecs, args.rows - paired);
}

// Four products a round, of tiles that stay where they are.
double peak(void*, const void* values, int64_t rounds) {
  constexpr int64_t kBytes = kTile * kTileBytes;
  const char* p = static_cast<const char*>(values);
  configure({kTile, kTile, kTile, 0});
  load<4>(p, kTileBytes);
  load<5>(p + kBytes, kTileBytes);
  load<6>(p + 2 * kBytes, kTileBytes);
  load<7>(p + 3 * kBytes, kTileBytes);
  zero<0>();
  zero<1>();
  zero<2>();
  zero<3>();
  for (int64_t round = 0; round < rounds; ++round) {
    multiply<0, 4, 6>();
    multiply<1, 4, 7>();
    multiply<2, 5, 6>();
    multiply<3, 5, 7>();
  }
  return 4 * 2.0 * kTile * kTile * kStep * static_cast<double>(rounds);
}

}  // namespace

const moelora::Kernels& moelora::bf16_kernels_amx_bf16() {
  static const Kernels kernels = [] {
    // Everything around the tile is done by vectors.
    Kernels k = bf16_kernels_avx512_bf16();
    k.name = "bf16_tile_32x32_amx_bf16";
    k.lanes = kTile;
    k.halves = false;
    k.weaves = false;
    k.vecs = kMaxTileVecs;
    for (int& rows : k.max_rows) rows = kMaxRows;
    k.tile = tile;
    // Tiles add up in another order.
    for (auto& flat : k.flat_tile) flat = nullptr;
    k.flat_lines = nullptr;
    for (auto& flat : k.flat_codes) flat = nullptr;
    k.flat_codes_rows = 0;
    k.peak = peak;
    k.release = release;
    return k;
  }();
  return kernels;
}
