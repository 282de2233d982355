// Flat tiles of packed weights as they are, for few rows, on AVX-512 with dot products of bf16: what is unpacked goes
// from register to register. Through memory, lines of all outputs would be more than L1 holds.
#pragma once

#include "ukernel/flat.inl"
#include "ukernel/unpack_avx512_bf16.inl"

namespace {

// Whose sums fit the registers beside a line and what it takes to unpack it.
constexpr int kFlatCodesRows = 6;
constexpr int64_t kCodesLanes = 64, kCodesTurn = 8;  // kCodesTurn: steps from one fetch to the next

// Lines of 64 lanes, a block of columns of two rows after the other: `begin` a block, then `next` for each two rows.
// takes: whether the scales are as it needs them.  failed: whether lines since `begin` were other than they should be.
template <bool High, bool Zeros, int64_t Group>
struct NibbleLines {
  const UnpackArgs& w;
  const uint8_t* codes;
  const float *scale, *zero;

  explicit NibbleLines(const UnpackArgs& args) : w(args) {}
  static bool takes(const UnpackArgs&) { return true; }
  static bool failed() { return false; }

  void begin(int64_t column, int64_t group) {
    codes = w.codes + column / 2;
    scale = w.scale + group;
    zero = Zeros ? w.zero + group : nullptr;
  }
  [[gnu::always_inline]] __m512i table(int64_t g) const {
    const float *a = scale + g, *b = a + w.scale_stride;
    if constexpr (Zeros) return Bf16Lines::table(w.values, *a, *b, zero[g], zero[g + w.scale_stride]);
    return Bf16Lines::table(w.values, *a, *b);
  }
  [[gnu::always_inline]] void next(__m512i (&line)[4]) {
    const uint8_t *a = codes, *b = a + w.codes_stride;
    if constexpr (Group == 16) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) line[v] = Bf16Lines::nibbles_16<High>(a + 8 * v, b + 8 * v, table(v));
    } else if constexpr (Group == 32) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        Bf16Lines::nibbles_32<High>(&line[2 * v], &line[2 * v + 1], Bf16Lines::byte_pairs(a + 16 * v, b + 16 * v),
                                    table(v));
    } else {
      Bf16Lines::nibbles_64<High>(line, a, b, table(0));
    }
    codes += 2 * w.codes_stride;
    scale += 2 * w.scale_stride;
    if (Zeros) zero += 2 * w.scale_stride;
  }
};

struct Int8Lines {
  const UnpackArgs& w;
  const uint8_t* codes;
  const float* scale;

  explicit Int8Lines(const UnpackArgs& args) : w(args) {}
  static bool takes(const UnpackArgs&) { return true; }
  static bool failed() { return false; }

  void begin(int64_t column, int64_t group) {
    codes = w.codes + column;
    scale = w.scale + group;
  }
  [[gnu::always_inline]] void next(__m512i (&line)[4]) {
    const __m512 factor_a = _mm512_set1_ps(scale[0]), factor_b = _mm512_set1_ps(scale[w.scale_stride]);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      line[v] = Bf16Lines::bytes_16<Code::int8>(codes + 16 * v, codes + w.codes_stride + 16 * v, factor_a, factor_b);
#ifdef __clang__
      asm("" : "+v"(line[v]));  // clang 16 breaks down over a product of what is permuted
#endif
    }
    codes += 2 * w.codes_stride;
    scale += 2 * w.scale_stride;
  }
};

// Of rows that have the same scales.
struct E4m3Lines {
  const UnpackArgs& w;
  const uint8_t* codes;
  float scale;
  E4m3Codes<Bytes64> of;

  explicit E4m3Lines(const UnpackArgs& args) : w(args), scale(*args.scale), of(E4m3Numbers(scale)) {}

  static bool takes(const UnpackArgs& args) { return scales_alike(args); }
  // A code was NaN.
  bool failed() { return of.met_nan(); }

  void begin(int64_t column, int64_t group) {
    codes = w.codes + column;
    if (w.scale[group] != scale) of.use(E4m3Numbers(scale = w.scale[group]));
  }
  [[gnu::always_inline]] void next(__m512i (&line)[4]) {
    Bf16Lines::e4m3_64(line, codes, codes + w.codes_stride, of);
    codes += 2 * w.codes_stride;
  }
};

// C: [MR][64], a block of columns. False: nothing is written.
template <class Op, int MR, class Lines>
[[gnu::always_inline]] inline bool flat_codes_block(const moelora::FlatArgs& args, typename Op::acc_t* c, Lines& lines,
                                                    Fetcher& ahead) {
  typename Op::vec acc[MR][4];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      acc[i][v] = args.start == moelora::Start::resume ? Op::load(c + i * args.ldc + v * Op::lanes) : Op::zero();
  for (int64_t p = 0; p < args.depth;) {
    ahead.step();
    for (const int64_t stop = p + kCodesTurn < args.depth ? p + kCodesTurn : args.depth; p < stop; p += Op::pack) {
      __m512i line[4];
      lines.next(line);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const auto* l =
            reinterpret_cast<const typename Op::elem*>(static_cast<const char*>(args.l) + i * args.l_stride);
        const typename Op::opvec a = Op::broadcast(l + p);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) acc[i][v] = Op::fma(a, (typename Op::opvec)line[v], acc[i][v]);
      }
    }
  }
  if (lines.failed()) return false;
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) Op::store(c + i * args.ldc + v * Op::lanes, acc[i][v]);
  return true;
}

// A block of E4M3 codes by way of memory.
template <class Op>
void flat_codes_in_memory(UnpackArgs w, moelora::FlatArgs args, int64_t at) {
  bf16_t lines[moelora::kMaxFlatCodesDepth / 2][2 * kCodesLanes];
  const int64_t groups = (w.first + at) / w.group - w.first / w.group;
  w.first += at;
  w.n = kCodesLanes;
  w.scale += groups;
  w.to = lines;
  w.to_stride = sizeof(lines[0]);
  w.ahead = 0;
  Bf16Lines::unpack_lines<Code::e4m3>(w);
  args.r = lines;
  args.r_stride = sizeof(lines[0]);
  args.width = kCodesLanes;
  args.c = static_cast<typename Op::acc_t*>(args.c) + at;
  args.ahead = {};
  flat_any<Op, Rows<Op, bf16_t, 2>, kFlatCodesRows>(args);
}

template <class Op, class Lines, int MR = kFlatCodesRows>
bool flat_codes_tile(const UnpackArgs& w, const moelora::FlatArgs& args) {
  if constexpr (MR > 1)
    if (args.rows < MR) return flat_codes_tile<Op, Lines, MR - 1>(w, args);
  if (!Lines::takes(w)) return false;
  const int64_t turns = (args.depth + kCodesTurn - 1) / kCodesTurn;
  Fetcher ahead(args.ahead, args.width / kCodesLanes * turns);
  const int64_t first_group = w.first / w.group;
  Lines lines(w);
  for (int64_t j = 0; j < args.width; j += kCodesLanes) {
    lines.begin(w.first + j, (w.first + j) / w.group - first_group);
    if (!flat_codes_block<Op, MR>(args, static_cast<typename Op::acc_t*>(args.c) + j, lines, ahead))
      flat_codes_in_memory<Op>(w, args, j);
  }
  return true;
}

template <class Op, Code C>
bool flat_codes(const UnpackArgs& given, const moelora::FlatArgs& args) {
  const UnpackArgs w = given;  // not in memory that stores might change
  if (w.first % kCodesLanes != 0 || w.n % kCodesLanes != 0 || w.rows % 2 != 0) return false;
  const bool whole = w.group % kCodesLanes == 0;
  if constexpr (C == Code::int8) {
    return whole && flat_codes_tile<Op, Int8Lines>(w, args);
  } else if constexpr (C == Code::e4m3) {
    return whole && flat_codes_tile<Op, E4m3Lines>(w, args);
  } else {
    constexpr bool kHigh = C == Code::nibbles_high;
    if (whole)
      return w.zero ? flat_codes_tile<Op, NibbleLines<kHigh, true, kCodesLanes>>(w, args)
                    : flat_codes_tile<Op, NibbleLines<kHigh, false, kCodesLanes>>(w, args);
    if (w.zero) return false;
    if (w.group == 32) return flat_codes_tile<Op, NibbleLines<kHigh, false, 32>>(w, args);
    return w.group == 16 && flat_codes_tile<Op, NibbleLines<kHigh, false, 16>>(w, args);
  }
}

// For numbers of bf16.
template <class Op>
void fill_flat_codes(moelora::Kernels& k) {
  k.flat_codes_rows = kFlatCodesRows;
  k.flat_codes[static_cast<int>(Code::nibbles_high)] = flat_codes<Op, Code::nibbles_high>;
  k.flat_codes[static_cast<int>(Code::nibbles_low)] = flat_codes<Op, Code::nibbles_low>;
  k.flat_codes[static_cast<int>(Code::int8)] = flat_codes<Op, Code::int8>;
  k.flat_codes[static_cast<int>(Code::e4m3)] = flat_codes<Op, Code::e4m3>;
}

}  // namespace
