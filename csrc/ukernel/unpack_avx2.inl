// Unpacking to fp32 on AVX2.
#pragma once

#include "ukernel/unpack.inl"
#include "ukernel/unpack_e4m3.inl"
#include "ukernel/vec_avx2.inl"

namespace {

struct Bytes32 {
  using vec = __m256i;
  static constexpr int64_t kBytes = 32;

  template <int A, int B, int C, int D>
  static vec spread(__m256i parts) {
    return _mm256_permutevar8x32_epi32(parts, _mm256_setr_epi32(A, B, C, D, A, B, C, D));
  }
  static vec load(const uint8_t* p) {
    return _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                                       _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  }
  static vec set1(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static vec sign_and_exponent() {
    return _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -128, -127, -126, -125, -124, -123, -122, -121,  //
                            0, 1, 2, 3, 4, 5, 6, 7, -128, -127, -126, -125, -124, -123, -122, -121);
  }
  static vec bit_and(vec a, vec b) { return _mm256_and_si256(a, b); }
  static vec bit_xor(vec a, vec b) { return _mm256_xor_si256(a, b); }
  static vec add(vec a, vec b) { return _mm256_add_epi8(a, b); }
  static vec most(vec a, vec b) { return _mm256_max_epu8(a, b); }
  static vec lookup(vec table, vec index) { return _mm256_shuffle_epi8(table, index); }
  static vec upper_nibbles(vec v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), set1(0x0f)); }
  static bool any_negative(vec v) { return _mm256_movemask_epi8(v) != 0; }
  static bool all_negative(vec v) { return _mm256_movemask_epi8(v) == -1; }
};

struct Avx2Unpack {
  using V = F32x8;
  using elem = float;

  static __m128i load_bytes(const uint8_t* p, int64_t n) {
    if (n >= 8) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    uint64_t part = 0;
    for (int64_t i = n; i-- > 0;) part = part << 8 | p[i];
    return _mm_cvtsi64_si128(static_cast<int64_t>(part));
  }
  // E4M3 as half precision of the 256th part, which has room for it: its exponent begins 8 earlier.
  static __m256i as_halves(__m256i wide) {
    // Adding it once more moves the sign up.
    const __m256i sign = _mm256_and_si256(wide, _mm256_set1_epi16(0x80));
    const __m256i half = _mm256_slli_epi16(_mm256_add_epi16(wide, sign), 7);
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_add_epi16(half, half), _mm256_set1_epi16(0x7f00));
    return _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
  }
  static __m256 from_e4m3(__m128i bytes) {
    const __m256i halves = as_halves(_mm256_cvtepu8_epi16(bytes));
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_set1_ps(256.0f));
  }
  static __m256 from_e8m0(__m128i bytes) {
    const __m256i wide = _mm256_cvtepu8_epi32(bytes), normal = _mm256_slli_epi32(wide, 23);
    const __m256i zero = _mm256_cmpeq_epi32(wide, _mm256_setzero_si256());
    const __m256i least = _mm256_and_si256(zero, _mm256_set1_epi32(0x00400000));
    const __m256i nan = _mm256_cmpeq_epi32(wide, _mm256_set1_epi32(255));
    return _mm256_castsi256_ps(
        _mm256_or_si256(_mm256_or_si256(normal, least), _mm256_and_si256(nan, _mm256_set1_epi32(0x7fc00000))));
  }
  template <auto C>
  static __m256 bytes(const uint8_t* p, int64_t n) {
    const __m128i b = load_bytes(p, n);
    if constexpr (__is_same(decltype(C), Code))
      return C == Code::int8 ? _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)) : from_e4m3(b);
    else if constexpr (C == ScaleType::e8m0)
      return from_e8m0(b);
    else if constexpr (C == ScaleType::e4m3)
      return from_e4m3(b);
    else
      return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b));
  }
  static __m256 canonical(__m256 v) {
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(v, nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }

  // Their bits moved up, over the sign: the largest, and the least but zeros, which wrap.
  class Sizes {
   public:
    void add(__m256 v) {
      const __m256i size = _mm256_slli_epi32(_mm256_castps_si256(v), 1);
      most_ = _mm256_max_epu32(most_, size);
      least_ = _mm256_min_epu32(least_, _mm256_add_epi32(size, _mm256_set1_epi32(-1)));
    }
    bool ordinary() const {
      const __m256i most = _mm256_set1_epi32(static_cast<int>(moelora::kMostOrdinaryBits));
      const __m256i least = _mm256_set1_epi32(static_cast<int>(moelora::kLeastOrdinaryBits - 1));
      return _mm256_movemask_epi8(_mm256_and_si256(_mm256_cmpeq_epi32(_mm256_max_epu32(most_, most), most),
                                                   _mm256_cmpeq_epi32(_mm256_min_epu32(least_, least), least))) == -1;
    }

   private:
    __m256i most_ = _mm256_setzero_si256(), least_ = _mm256_set1_epi32(-1);
  };

  static __m256i rounding_to_bf16(__m256 v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  static __m256 round_as(__m256 v, float) { return v; }
  static __m256 round_as(__m256 v, bf16_t) {
    return _mm256_castsi256_ps(_mm256_and_si256(rounding_to_bf16(v), _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static __m256 round_as(__m256 v, f16_t) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  // The same for ordinary products.
  template <class T>
  static __m256 round_ordinary(__m256 v, T) {
    return round_as(v, T{});
  }
  static __m256 round_ordinary(__m256 v, bf16_t) { return round_ordinary_to_bf16(v); }
  template <class T>
  static void put(elem* to, __m256 v, int64_t n) {
    V::store_n(to, round_as(v, T{}), n);
  }

  template <Code C, class T>
  struct Block;

  // The 16 numbers of a group, before they are rounded.
  struct Scaled {
    __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();

    Scaled() = default;
    Scaled(const float* values, float scale, const float* zero) {
      low = _mm256_loadu_ps(values);
      high = _mm256_loadu_ps(values + 8);
      if (zero) {
        low = _mm256_sub_ps(low, _mm256_set1_ps(*zero));
        high = _mm256_sub_ps(high, _mm256_set1_ps(*zero));
      }
      low = _mm256_mul_ps(low, _mm256_set1_ps(scale));
      high = _mm256_mul_ps(high, _mm256_set1_ps(scale));
    }
  };

  template <class T, bool Ordinary>
  struct Table;

  // Whole groups of a multiple of 32.
  template <class T, bool High>
  static void groups(elem* to, const uint8_t* codes, const float* values, const float* scales, const float* zeros,
                     int64_t group, int64_t n, int64_t ahead) {
    for (const elem* end = to + n; to < end; ++scales, to += group, codes += group / 2) {
      const Table<T, true> table(values, *scales, zeros);
      if (zeros) ++zeros;
      for (int64_t i = 0; i < group; i += 32) {
        fetch(codes + i / 2, ahead);
        table.template lookup_32<High>(to + i, codes + i / 2);
      }
    }
  }

  static constexpr int64_t kSmallGroup = 16;
  template <class T, bool High>
  static void small_groups(elem* to, const uint8_t* codes, const float* values, const float* scales, int64_t n,
                           int64_t ahead);

  // Nibbles one by one.
  template <bool High, class Numbers>
  static void lookup_rest(const Numbers& numbers, elem* to, const uint8_t* codes, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = numbers.at(codes[i / 2] >> ((i % 2 == 0) == High ? 4 : 0) & 15);
  }
};

template <class T>
struct Avx2Unpack::Block<Code::int8, T> {
  static constexpr int64_t kColumns = 16;
  __m256 factor;

  explicit Block(float scale) : factor(_mm256_set1_ps(scale)) {}
  void operator()(elem* to, const uint8_t* codes) const {
    for (int i = 0; i < kColumns; i += 8)
      _mm256_storeu_ps(to + i, round_ordinary(_mm256_mul_ps(bytes<Code::int8>(codes + i, 8), factor), T{}));
  }
};

template <class T>
struct Avx2Unpack::Block<Code::e4m3, T> {
  static constexpr bool kScaled = __is_same(T, bf16_t);  // the tables' numbers are
  static constexpr int64_t kColumns = Bytes32::kBytes;
  E4m3Codes<Bytes32> codes_of;
  __m256 factor;

  static bool takes(float scale) { return scale != 0; }
  explicit Block(float scale) : codes_of(E4m3Numbers(kScaled ? scale : 1.0f)), factor(_mm256_set1_ps(scale)) {}
  bool failed() { return codes_of.met_nan(); }
  [[gnu::always_inline]] void operator()(elem* to, const uint8_t* codes) {
    const auto put = [&](__m256i words, int at) __attribute__((always_inline)) {
      const __m256 v = _mm256_castsi256_ps(words);
      _mm256_storeu_ps(to + at, kScaled ? v : round_as(_mm256_mul_ps(v, factor), T{}));
    };
    __m256i low, high;
    codes_of.bytes(codes, low, high);
    const __m256i none = _mm256_setzero_si256();
    const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    put(_mm256_unpacklo_epi16(none, first), 0);
    put(_mm256_unpackhi_epi16(none, first), 8);
    put(_mm256_unpacklo_epi16(none, second), 16);
    put(_mm256_unpackhi_epi16(none, second), 24);
  }
};

template <bool Ordinary>
struct Avx2Unpack::Table<float, Ordinary> {
  __m256 low, high;

  Table(const float* values, float scale, const float* zero) {
    const Scaled all(values, scale, zero);
    low = all.low;
    high = all.high;
  }
  float at(int i) const { return i < 8 ? low[i] : high[i - 8]; }

  template <bool High>
  void lookup(elem* to, const uint8_t* codes, int64_t n) const {
    const __m256i shifts =
        High ? _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24) : _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      int four;
      __builtin_memcpy(&four, codes + i / 2, 4);
      const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(four), shifts);
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      _mm256_storeu_ps(
          to + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper));
    }
    lookup_rest<High>(*this, to + i, codes + i / 2, n - i);
  }
  template <bool High>
  void lookup_32(elem* to, const uint8_t* codes) const {
    lookup<High>(to, codes, 32);
  }
};

// 16-bit numbers: their bytes are looked up.
template <class T, bool Ordinary>
struct Avx2Unpack::Table {
  static constexpr bool kHalf = __is_same(T, f16_t);
  __m256i low_bytes, high_bytes;  // of each number, twice

  Table(const float* values, float scale, const float* zero) : Table(Scaled(values, scale, zero)) {}
  explicit Table(const Scaled& all) {
    const auto bits = [](__m256 v) {
      if constexpr (kHalf) return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
      return _mm256_castps_si256(Ordinary ? round_ordinary(v, T{}) : round_as(v, T{}));
    };
    // Both numbers' words in one.
    const __m256i low = bits(all.low), high = bits(all.high);
    const __m256i words =
        kHalf ? _mm256_or_si256(low, _mm256_slli_epi32(high, 16)) : _mm256_or_si256(_mm256_srli_epi32(low, 16), high);
    const __m256i each = _mm256_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15,  //
                                          0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
    const __m256i bytes = _mm256_shuffle_epi8(words, each);
    low_bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    high_bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7));
  }
  float at(int i) const {
    alignas(32) uint8_t low[32], high[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(low), low_bytes);
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), high_bytes);
    return moelora::to_float(T{static_cast<uint16_t>(high[i] << 8 | low[i])});
  }

  // Sixteen bytes of codes in the order in which numbers come out of `store`, each byte twice.
  static __m256i spread(__m128i codes) {
    const __m256i order = kHalf ? _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11, 4, 4, 5, 5, 6, 6,
                                                   7, 7, 12, 12, 13, 13, 14, 14, 15, 15)
                                : _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 2, 2, 3, 3, 6, 6,
                                                   7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(codes), order);
  }
  // Sixteen numbers, as they are put(vector of eight, column).
  template <class Put>
  [[gnu::always_inline]] static void widen(__m256i words, const Put& put) {
    if constexpr (kHalf) {
      put(_mm256_cvtph_ps(_mm256_castsi256_si128(words)), 0);
      put(_mm256_cvtph_ps(_mm256_extracti128_si256(words, 1)), 8);
    } else {
      const __m256i none = _mm256_setzero_si256();
      put(_mm256_castsi256_ps(_mm256_unpacklo_epi16(none, words)), 0);
      put(_mm256_castsi256_ps(_mm256_unpackhi_epi16(none, words)), 8);
    }
  }
  static void store(elem* to, __m256i words) {
    widen(words, [to](__m256 v, int at) { _mm256_storeu_ps(to + at, v); });
  }

  template <bool High>
  [[gnu::always_inline]] void lookup_bytes(__m128i codes, __m256i& low, __m256i& high) const {
    const __m256i twice = spread(codes), shifted = _mm256_srli_epi16(twice, 4);
    const __m256i even = _mm256_set1_epi16(0x000f), odd = _mm256_set1_epi16(0x0f00);
    const __m256i index =
        _mm256_or_si256(_mm256_and_si256(High ? shifted : twice, even), _mm256_and_si256(High ? twice : shifted, odd));
    low = _mm256_shuffle_epi8(low_bytes, index);
    high = _mm256_shuffle_epi8(high_bytes, index);
  }

  // 32 numbers, put as by `widen`.
  template <bool High, class Put>
  [[gnu::always_inline]] void lookup_32(const uint8_t* codes, const Put& put) const {
    __m256i low, high;
    lookup_bytes<High>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), low, high);
    widen(_mm256_unpacklo_epi8(low, high), put);
    widen(_mm256_unpackhi_epi8(low, high),
          [&put](__m256 v, int at) __attribute__((always_inline)) { put(v, at + 16); });
  }
  template <bool High>
  void lookup_32(elem* to, const uint8_t* codes) const {
    lookup_32<High>(codes, [to](__m256 v, int at) __attribute__((always_inline)) { _mm256_storeu_ps(to + at, v); });
  }
  template <bool High>
  void lookup(elem* to, const uint8_t* codes, int64_t n) const {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) lookup_32<High>(to + i, codes + i / 2);
    if (i + 16 <= n) {
      __m256i low, high;
      lookup_bytes<High>(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)), low, high);
      store(to + i, _mm256_unpacklo_epi8(low, high));
      i += 16;
    }
    lookup_rest<High>(*this, to + i, codes + i / 2, n - i);
  }
};

// Values are looked up, then scaled: they are numbers of bf16.
template <class T, bool High>
void Avx2Unpack::small_groups(elem* to, const uint8_t* codes, const float* values, const float* scales, int64_t n,
                              int64_t ahead) {
  const Table<bf16_t, true> table(values, 1.0f, nullptr);
  for (int64_t i = 0; i < n; i += 32, scales += 2) {
    fetch(codes + i / 2, ahead);
    __m256i low, high;
    table.template lookup_bytes<High>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)), low, high);
    const auto scaled = [&](elem* at, __m256i words, float scale) {
      table.widen(words, [at, scale](__m256 v, int j) {
        _mm256_storeu_ps(at + j, round_ordinary(_mm256_mul_ps(v, _mm256_set1_ps(scale)), T{}));
      });
    };
    scaled(to + i, _mm256_unpacklo_epi8(low, high), scales[0]);
    scaled(to + i + 16, _mm256_unpackhi_epi8(low, high), scales[1]);
  }
}

}  // namespace
