// Dot products of rows of codes, unpacked in registers, on AVX2. For few columns: what unpacks and what
// multiplies then share the processor, where one after the other each would leave the other's ports idle.
#pragma once

#include "ukernel/dot.inl"
#include "ukernel/unpack_avx2.inl"

namespace {

constexpr int64_t kCodesLanes = 32;
constexpr int kDotCodesCols = 3;

// Numbers of 32 codes of a row, put(vector of eight, column), of the group that was last in `use`.
template <bool High, bool Zeros>
struct NibbleLanes {
  Avx2Unpack::Table<bf16_t, true> table{Avx2Unpack::Scaled()};

  explicit NibbleLanes(const UnpackArgs&) {}
  void use(const UnpackArgs& w, int64_t row, int64_t group) {
    const int64_t at = row * w.scale_stride + group;
    table = Avx2Unpack::Table<bf16_t, true>(w.values, w.scale[at], Zeros ? w.zero + at : nullptr);
  }
  template <class Put>
  [[gnu::always_inline]] void operator()(const uint8_t* codes, const Put& put) const {
    table.template lookup_32<High>(codes, put);
  }
};

// Small groups: values are looked up, then scaled, since they are numbers of bf16.
template <bool High, int Group, bool Round>
struct ScaledLanes {
  Avx2Unpack::Table<bf16_t, true> table;
  const float* scale = nullptr;

  explicit ScaledLanes(const UnpackArgs& w) : table(w.values, 1.0f, nullptr) {}
  void use(const UnpackArgs& w, int64_t row, int64_t group) { scale = w.scale + row * w.scale_stride + group; }
  template <class Put>
  [[gnu::always_inline]] void operator()(const uint8_t* codes, const Put& put) const {
    table.template lookup_32<High>(codes, [&](__m256 v, int at) __attribute__((always_inline)) {
      const __m256 number = _mm256_mul_ps(v, _mm256_set1_ps(scale[at / Group]));
      put(Round ? round_ordinary_to_bf16(number) : number, at);
    });
  }
};

// Whether values are numbers of bf16 and scales powers of two, or 0: then products are, too.
inline bool products_are_exact(const UnpackArgs& w) {
  const auto bits = [](float v) { return moelora::bit_cast<uint32_t>(v); };
  const int64_t groups = (w.first + w.n - 1) / w.group - w.first / w.group + 1;
  uint32_t below = 0;
  for (int i = 0; i < 16; ++i) below |= bits(w.values[i]) & 0xffff;
  for (int64_t p = 0; p < w.rows; ++p)
    for (int64_t g = 0; g < groups; ++g) below |= bits(w.scale[p * w.scale_stride + g]) & 0x7fffff;
  return below == 0;
}

// The same of bytes and of one scale, the last in `use`.
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

// The same of nibbles, row after row of a group.
template <class Op, class Lanes, int MR, int NC>
bool dot_nibbles_tile(const UnpackArgs& w, const moelora::DotArgs& args) {
  typename Op::vec acc[NC][MR];
#pragma GCC unroll 8
  for (int j = 0; j < NC; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) acc[j][i] = Op::zero();
  const float* r = static_cast<const float*>(args.segments[0].r);
  const int64_t r_stride = args.segments[0].r_stride / static_cast<int64_t>(sizeof(float)), last = w.rows - 1;
  const int64_t span = w.group % 64 == 0 ? 64 : kCodesLanes;
  Fetcher ahead(args.ahead, w.n / span);
  Lanes lanes(w);
  const uint8_t* codes = w.codes + w.first / 2;
  for (int64_t column = 0; column < w.n; column += span, codes += span / 2, r += span) {
    const int64_t group = (w.first + column) / w.group - w.first / w.group;
    ahead.step();
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const int64_t row = i < last ? i : last;
      lanes.use(w, row, group);
      for (int64_t at = 0; at < span; at += kCodesLanes)
        lanes(codes + row * w.codes_stride + at / 2, [&](__m256 v, int lane) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int j = 0; j < NC; ++j) acc[j][i] = Op::fma(v, _mm256_loadu_ps(r + j * r_stride + at + lane), acc[j][i]);
        });
    }
  }
  finish_dots<Op>(acc, args);
  return true;
}

template <class Op, class Lanes, int NC = kDotCodesCols>
bool dot_nibbles_any(const UnpackArgs& w, const moelora::DotArgs& args) {
  if constexpr (NC > 1)
    if (args.cols < NC) return dot_nibbles_any<Op, Lanes, NC - 1>(w, args);
  return dot_nibbles_tile<Op, Lanes, Op::dot_rows[NC - 1], NC>(w, args);
}

template <class Op, bool High>
bool dot_nibbles(const UnpackArgs& given, const moelora::DotArgs& args) {
  const UnpackArgs w = given;
  if (w.first % 64 != 0 || w.n % 64 != 0) return false;
  const bool whole = w.group % kCodesLanes == 0;
  if (w.zero) return whole && dot_nibbles_any<Op, NibbleLanes<High, true>>(w, args);
  if (w.group == 16) return dot_nibbles_any<Op, ScaledLanes<High, 16, true>>(w, args);
  if (w.group == 32 && products_are_exact(w)) return dot_nibbles_any<Op, ScaledLanes<High, 32, false>>(w, args);
  return whole && dot_nibbles_any<Op, NibbleLanes<High, false>>(w, args);
}

template <class Op, class Lanes, int NC = kDotCodesCols>
bool dot_codes(const UnpackArgs& given, const moelora::DotArgs& args) {
  if constexpr (NC > 1)
    if (args.cols < NC) return dot_codes<Op, Lanes, NC - 1>(given, args);
  const UnpackArgs w = given;  // not in memory that stores might change
  return dot_codes_tile<Op, Lanes, Op::dot_rows[NC - 1], NC>(w, args);
}

// For numbers of bf16.
template <class Op>
void fill_dot_codes(moelora::Kernels& k) {
  k.dot_codes_cols = kDotCodesCols;
  k.dot_codes[static_cast<int>(Code::nibbles_high)] = dot_nibbles<Op, true>;
  k.dot_codes[static_cast<int>(Code::nibbles_low)] = dot_nibbles<Op, false>;
  k.dot_codes[static_cast<int>(Code::int8)] = dot_codes<Op, Int8Lanes>;
  k.dot_codes[static_cast<int>(Code::e4m3)] = dot_codes<Op, E4m3Lanes>;
}

}  // namespace
