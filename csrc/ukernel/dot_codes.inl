// Dot products of rows of 8-bit codes, unpacked in registers, on AVX2. For few columns: what unpacks and what
// multiplies then share the processor, where one after the other each would leave the other's ports idle.
#pragma once

#include "ukernel/dot.inl"
#include "ukernel/unpack_avx2.inl"

namespace {

// Of one row and one group: puts the numbers of 32 codes, eight at a time.
struct Int8Lanes {
  __m256 factor = _mm256_setzero_ps();

  static bool takes(float) { return true; }
  void use(float scale) { factor = _mm256_set1_ps(scale); }
  bool failed() const { return false; }
  template <class Put>
  [[gnu::always_inline]] void operator()(const uint8_t* codes, const Put& put) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
      put(round_ordinary_to_bf16(_mm256_mul_ps(Avx2Unpack::bytes<Code::int8>(codes + 8 * q, 8), factor)), 8 * q);
  }
};

struct E4m3Lanes {
  E4m3Codes<Bytes32> codes_of{E4m3Numbers(1.0f)};
  float scale = 1.0f;

  static bool takes(float s) { return s != 0; }
  void use(float s) {
    if (s != scale) codes_of.use(E4m3Numbers(scale = s));
  }
  bool failed() { return codes_of.met_nan(); }
  template <class Put>
  [[gnu::always_inline]] void operator()(const uint8_t* codes, const Put& put) {
    __m256i low, high;
    codes_of.bytes(codes, low, high);
    const __m256i none = _mm256_setzero_si256();
    const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    put(_mm256_castsi256_ps(_mm256_unpacklo_epi16(none, first)), 0);
    put(_mm256_castsi256_ps(_mm256_unpackhi_epi16(none, first)), 8);
    put(_mm256_castsi256_ps(_mm256_unpacklo_epi16(none, second)), 16);
    put(_mm256_castsi256_ps(_mm256_unpackhi_epi16(none, second)), 24);
  }
};

// Adds the products of the codes to acc [NC][MR], each element the same chain as the dot tile's. False: some codes are
// not for this way.
template <class Op, class Lanes, int MR, int NC>
[[gnu::always_inline]] inline bool add_code_dots(typename Op::vec (&acc)[NC][MR], const UnpackArgs& w,
                                                 const moelora::DotSegment& segment) {
  Lanes lanes[MR];
  const auto row = [&w](int i) { return i < w.rows ? i : w.rows - 1; };
  const auto add = [&](int64_t column, int64_t stop, const auto& of) __attribute__((always_inline)) {
    for (; column < stop; column += 32) {
      const float* r = static_cast<const float*>(segment.r) + (column - w.first);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const uint8_t* codes = w.codes + row(i) * w.codes_stride + column;
        fetch(codes, w.ahead);
        of(i)(codes, [&](__m256 v, int at) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int j = 0; j < NC; ++j)
            acc[j][i] = Op::fma(v, _mm256_loadu_ps(r + j * (segment.r_stride / 4) + at), acc[j][i]);
        });
      }
    }
  };
  bool done = true;
  for_each_group(w, w.first / w.group, w.first, [&](int64_t group, int64_t column, int64_t stop) {
    const float first = w.scale[group];
    bool alike = true;
    for (int i = 0; i < MR; ++i) {
      const float scale = w.scale[row(i) * w.scale_stride + group];
      alike &= scale == first;
      done &= Lanes::takes(scale) && (stop - column) % 32 == 0;
    }
    if (!done) return;
    if (alike) {  // as in blocks: what one scale needs stays in registers
      Lanes one = lanes[0];
      one.use(first);
      add(column, stop, [&one](int) -> Lanes& { return one; });
      lanes[0] = one;
      return;
    }
    for (int i = 0; i < MR; ++i) lanes[i].use(w.scale[row(i) * w.scale_stride + group]);
    add(column, stop, [&lanes](int i) -> Lanes& { return lanes[i]; });
  });
  for (int i = 0; i < MR; ++i) done &= !lanes[i].failed();
  return done;
}

template <class Op, class Lanes, int MR, int NC>
bool dot_codes_tile(const UnpackArgs& w, const moelora::DotArgs& args) {
  typename Op::vec acc[NC][MR];
#pragma GCC unroll 8
  for (int j = 0; j < NC; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) acc[j][i] = Op::zero();
  if (!add_code_dots<Op, Lanes>(acc, w, args.segments[0])) return false;
  finish_dots<Op>(acc, args);
  return true;
}

template <class Op, class Lanes>
bool dot_codes(const UnpackArgs& given, const moelora::DotArgs& args) {
  const UnpackArgs w = given;  // not in memory that stores might change
  switch (args.cols) {
    case 1: return dot_codes_tile<Op, Lanes, Op::dot_rows[0], 1>(w, args);
    case 2: return dot_codes_tile<Op, Lanes, Op::dot_rows[1], 2>(w, args);
    case 3: return dot_codes_tile<Op, Lanes, Op::dot_rows[2], 3>(w, args);
    default: return false;
  }
}

// For numbers of bf16.
template <class Op>
void fill_dot_codes(moelora::Kernels& k) {
  k.dot_codes[static_cast<int>(Code::int8)] = dot_codes<Op, Int8Lanes>;
  k.dot_codes[static_cast<int>(Code::e4m3)] = dot_codes<Op, E4m3Lanes>;
}

}  // namespace
