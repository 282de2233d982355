// Dot tiles of packed weights as they are, for few columns, on AVX-512 with dot products of bf16: what is unpacked goes
// from register to register.
#pragma once

#include "ukernel/dot.inl"
#include "ukernel/unpack_avx512_bf16.inl"

namespace {

constexpr int64_t kCodesDepth = 64;

// Numbers of 64 codes of a row, in two vectors.  takes: whether the scales are as it needs them.  begin: the codes that
// follow are of this group.  failed: whether numbers were other than they should be.
template <bool High, bool Zeros, int64_t Group>
struct NibbleDots {
  const UnpackArgs& w;
  int64_t group = 0;

  explicit NibbleDots(const UnpackArgs& args) : w(args) {}
  static bool takes(const UnpackArgs&) { return true; }
  static bool failed() { return false; }
  void begin(int64_t g) { group = g; }

  [[gnu::always_inline]] void operator()(int64_t row, const uint8_t* codes, __m512i (&to)[2]) const {
    const float* scale = w.scale + row * w.scale_stride + group;
    if constexpr (Group == 64) {
      const float* zero = Zeros ? w.zero + row * w.scale_stride + group : nullptr;
      const Bf16Unpack::Table<bf16_t, true> table(w.values, *scale, zero);
      to[0] = _mm512_permutexvar_epi16(Bf16Unpack::index_32<High>(codes), table.numbers);
      to[1] = _mm512_permutexvar_epi16(Bf16Unpack::index_32<High>(codes + 16), table.numbers);
    } else {
      const __m512i first = _mm512_setzero_si512(), second = _mm512_set1_epi16(16);
      const __m512i pair = Bf16Lines::table(w.values, scale[0], scale[1]);
      if constexpr (Group == 32) {
        to[0] = Bf16Unpack::numbers_in_pair<High>(codes, first, pair);
        to[1] = Bf16Unpack::numbers_in_pair<High>(codes + 16, second, pair);
      } else {
        const __m512i both = _mm512_inserti64x4(first, _mm512_castsi512_si256(second), 1);
        to[0] = Bf16Unpack::numbers_in_pair<High>(codes, both, pair);
        to[1] = Bf16Unpack::numbers_in_pair<High>(codes + 16, both, Bf16Lines::table(w.values, scale[2], scale[3]));
      }
    }
  }
};

struct Int8Dots {
  const UnpackArgs& w;
  int64_t group = 0;

  explicit Int8Dots(const UnpackArgs& args) : w(args) {}
  static bool takes(const UnpackArgs&) { return true; }
  static bool failed() { return false; }
  void begin(int64_t g) { group = g; }

  [[gnu::always_inline]] void operator()(int64_t row, const uint8_t* codes, __m512i (&to)[2]) const {
    const Bf16Unpack::Block<Code::int8, bf16_t> block(w.scale[row * w.scale_stride + group]);
    to[0] = Bf16Unpack::both_to_bf16(block.numbers(codes), block.numbers(codes + 16));
    to[1] = Bf16Unpack::both_to_bf16(block.numbers(codes + 32), block.numbers(codes + 48));
  }
};

// Of rows that have the same scales.
struct E4m3Dots {
  const UnpackArgs& w;
  float scale;
  E4m3Codes<WordBytes64> of;

  explicit E4m3Dots(const UnpackArgs& args) : w(args), scale(*args.scale), of(E4m3Numbers(scale)) {}
  static bool takes(const UnpackArgs& args) { return scales_alike(args); }
  bool failed() { return of.met_nan(); }
  void begin(int64_t g) {
    if (w.scale[g] != scale) of.use(E4m3Numbers(scale = w.scale[g]));
  }

  [[gnu::always_inline]] void operator()(int64_t, const uint8_t* codes, __m512i (&to)[2]) {
    __m512i low, high;
    of.bytes(codes, low, high);
    to[0] = _mm512_unpacklo_epi8(low, high);
    to[1] = _mm512_unpackhi_epi8(low, high);
  }
};

// Adds the products of the codes to acc [NC][MR], each element the same chain as the dot tile's.
template <class Op, Code C, int MR, int NC, class Dots>
[[gnu::always_inline]] inline void add_code_dots(typename Op::vec (&acc)[NC][MR], const UnpackArgs& w,
                                                 const moelora::DotArgs& args, Dots& dots, int64_t groups_a_block) {
  const int64_t blocks = w.n / kCodesDepth, bytes = kCodesDepth * moelora::bits_of(C) / 8;
  const uint8_t* codes = w.codes + w.first * moelora::bits_of(C) / 8;
  const bf16_t* r = static_cast<const bf16_t*>(args.segments[0].r);
  const int64_t r_stride = args.segments[0].r_stride / static_cast<int64_t>(sizeof(bf16_t));
  const int64_t last = w.rows - 1;
  Fetcher ahead(args.ahead, blocks);
  int64_t group = 0, left = w.group - w.first % w.group;
  dots.begin(0);
  for (int64_t b = 0; b < blocks; ++b, codes += bytes, r += kCodesDepth) {
    ahead.step();
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const int64_t row = i < last ? i : last;
      __m512i numbers[2];
      dots(row, codes + row * w.codes_stride, numbers);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
#pragma GCC unroll 8
        for (int j = 0; j < NC; ++j)
          acc[j][i] = Op::fma((typename Op::opvec)numbers[v], Op::load_whole(r + j * r_stride + 32 * v), acc[j][i]);
    }
    if (groups_a_block > 0) {
      dots.begin(group += groups_a_block);
    } else if ((left -= kCodesDepth) == 0 && b + 1 < blocks) {
      left = w.group;
      dots.begin(++group);
    }
  }
}

template <class Op, Code C, class Dots, int MR, int NC>
bool dot_codes_tile(const UnpackArgs& w, const moelora::DotArgs& args, int64_t groups_a_block) {
  typename Op::vec acc[NC][MR];
#pragma GCC unroll 8
  for (int j = 0; j < NC; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) acc[j][i] = Op::zero();
  Dots dots(w);
  add_code_dots<Op, C>(acc, w, args, dots, groups_a_block);
  if (dots.failed()) return false;
  finish_dots<Op>(acc, args);
  return true;
}

template <class Op, Code C, class Dots, int NC = moelora::kMaxDotCols>
bool dot_codes_any(const UnpackArgs& w, const moelora::DotArgs& args, int64_t groups_a_block) {
  if constexpr (NC > 1)
    if (args.cols < NC) return dot_codes_any<Op, C, Dots, NC - 1>(w, args, groups_a_block);
  return Dots::takes(w) && dot_codes_tile<Op, C, Dots, Op::dot_rows[NC - 1], NC>(w, args, groups_a_block);
}

template <class Op, Code C>
bool dot_codes(const UnpackArgs& given, const moelora::DotArgs& args) {
  const UnpackArgs w = given;  // not in memory that stores might change
  if (w.first % kCodesDepth != 0 || w.n % kCodesDepth != 0 || w.n == 0) return false;
  const bool whole = w.group % kCodesDepth == 0;
  if constexpr (C == Code::int8) {
    return whole && dot_codes_any<Op, C, Int8Dots>(w, args, 0);
  } else if constexpr (C == Code::e4m3) {
    return whole && dot_codes_any<Op, C, E4m3Dots>(w, args, 0);
  } else {
    constexpr bool kHigh = C == Code::nibbles_high;
    if (whole)
      return w.zero ? dot_codes_any<Op, C, NibbleDots<kHigh, true, 64>>(w, args, 0)
                    : dot_codes_any<Op, C, NibbleDots<kHigh, false, 64>>(w, args, 0);
    if (w.zero) return false;
    if (w.group == 32) return dot_codes_any<Op, C, NibbleDots<kHigh, false, 32>>(w, args, 2);
    return w.group == 16 && dot_codes_any<Op, C, NibbleDots<kHigh, false, 16>>(w, args, 4);
  }
}

// For numbers of bf16.
template <class Op>
void fill_dot_codes(moelora::Kernels& k) {
  k.dot_codes_cols = moelora::kMaxDotCols;
  k.dot_codes[static_cast<int>(Code::nibbles_high)] = dot_codes<Op, Code::nibbles_high>;
  k.dot_codes[static_cast<int>(Code::nibbles_low)] = dot_codes<Op, Code::nibbles_low>;
  k.dot_codes[static_cast<int>(Code::int8)] = dot_codes<Op, Code::int8>;
  k.dot_codes[static_cast<int>(Code::e4m3)] = dot_codes<Op, Code::e4m3>;
}

}  // namespace
