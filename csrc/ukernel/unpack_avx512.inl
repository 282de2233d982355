// Unpacking on AVX-512, to fp32.
#pragma once

#include "ukernel/unpack.inl"
#include "ukernel/unpack_e4m3.inl"
#include "ukernel/vec_avx512.inl"

namespace {

struct Bytes64 {
  using vec = __m512i;
  static constexpr int64_t kBytes = 64;

  template <int A, int B, int C, int D>
  static vec spread(__m256i parts) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(A, B, C, D, A, B, C, D, A, B, C, D, A, B, C, D),
                                    _mm512_castsi256_si512(parts));
  }
  static vec load(const uint8_t* p) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
                                    _mm512_loadu_si512(p));
  }
  static vec set1(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static vec sign_and_exponent() {
    const int a = 0x03020100, b = 0x07060504, sign = static_cast<int>(0x80808080);
    return _mm512_setr_epi32(a, b, a | sign, b | sign, a, b, a | sign, b | sign, a, b, a | sign, b | sign, a, b,
                             a | sign, b | sign);
  }
  static vec bit_and(vec a, vec b) { return _mm512_and_si512(a, b); }
  static vec bit_xor(vec a, vec b) { return _mm512_xor_si512(a, b); }
  static vec add(vec a, vec b) { return _mm512_add_epi8(a, b); }
  static vec most(vec a, vec b) { return _mm512_max_epu8(a, b); }
  static vec lookup(vec table, vec index) { return _mm512_shuffle_epi8(table, index); }
  static vec upper_nibbles(vec v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), set1(0x0f)); }
  static bool any_negative(vec v) { return _mm512_movepi8_mask(v) != 0; }
  static bool all_negative(vec v) { return _mm512_movepi8_mask(v) == ~__mmask64{0}; }
};

struct Avx512Values {
  using V = F32x16;

  static __m128i load_bytes(const uint8_t* p, int64_t n) {
    if (n == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_maskz_loadu_epi8(first16(n), p);
  }
  // E4M3 as half precision of the 256th part, which has room for it: its exponent begins 8 earlier.
  static __m256i as_halves(__m128i bytes) {
    const __m256i wide = _mm256_cvtepu8_epi16(bytes);
    // Adding it once more moves the sign up.
    const __m256i sign = _mm256_and_si256(wide, _mm256_set1_epi16(0x80));
    const __m256i half = _mm256_slli_epi16(_mm256_add_epi16(wide, sign), 7);
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_add_epi16(half, half), _mm256_set1_epi16(0x7f00));
    return _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
  }
  static __m512 from_e4m3(__m128i bytes) {
    return _mm512_mul_ps(_mm512_cvtph_ps(as_halves(bytes)), _mm512_set1_ps(256.0f));
  }
  static __m512 from_e8m0(__m128i bytes) {
    const __m512i wide = _mm512_cvtepu8_epi32(bytes), normal = _mm512_slli_epi32(wide, 23);
    const __mmask16 zero = _mm512_cmpeq_epi32_mask(wide, _mm512_setzero_si512());
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(255));
    const __m512i finite = _mm512_mask_mov_epi32(normal, zero, _mm512_set1_epi32(0x00400000));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(finite, nan, _mm512_set1_epi32(0x7fc00000)));
  }
  template <auto C>
  static __m512 bytes(const uint8_t* p, int64_t n) {
    const __m128i b = load_bytes(p, n);
    if constexpr (__is_same(decltype(C), Code))
      return C == Code::int8 ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)) : from_e4m3(b);
    else if constexpr (C == ScaleType::e8m0)
      return from_e8m0(b);
    else if constexpr (C == ScaleType::e4m3)
      return from_e4m3(b);
    else
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b));
  }
  static __m512 canonical(__m512 v) {
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_castps_si512(v), nan, _mm512_set1_epi32(0x7fc00000)));
  }
  // Their bits moved up, over the sign: the largest, and the least but zeros, which wrap.
  class Sizes {
   public:
    void add(__m512 v) {
      const __m512i size = _mm512_slli_epi32(_mm512_castps_si512(v), 1);
      most_ = _mm512_max_epu32(most_, size);
      least_ = _mm512_min_epu32(least_, _mm512_add_epi32(size, _mm512_set1_epi32(-1)));
    }
    bool ordinary() const {
      const __m512i most = _mm512_set1_epi32(static_cast<int>(moelora::kMostOrdinaryBits));
      const __m512i least = _mm512_set1_epi32(static_cast<int>(moelora::kLeastOrdinaryBits - 1));
      return _mm512_cmpeq_epi32_mask(_mm512_max_epu32(most_, most), most) == 0xffff &&
             _mm512_cmpeq_epi32_mask(_mm512_min_epu32(least_, least), least) == 0xffff;
    }

   private:
    __m512i most_ = _mm512_setzero_si512(), least_ = _mm512_set1_epi32(-1);
  };
  // The 16 numbers of a group, before they are rounded.
  static __m512 scaled(const float* values, float scale, const float* zero) {
    __m512 v = _mm512_loadu_ps(values);
    if (zero) v = _mm512_sub_ps(v, _mm512_set1_ps(*zero));
    return _mm512_mul_ps(v, _mm512_set1_ps(scale));
  }
  static __m512i rounding_to_bf16(__m512 v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  // Unlike the instruction for it this one keeps subnormals.
  static __m256i to_bf16(__m512 v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounding_to_bf16(v), 16)); }
};

struct Avx512Unpack : Avx512Values {
  using elem = float;

  static __m512 round_as(__m512 v, float) { return v; }
  static __m512 round_as(__m512 v, bf16_t) {
    return _mm512_castsi512_ps(_mm512_and_si512(rounding_to_bf16(v), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static __m512 round_as(__m512 v, f16_t) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  // The same for ordinary products, as on AVX2.
  template <class T>
  static __m512 round_ordinary(__m512 v, T) {
    return round_as(v, T{});
  }
  static __m512 round_ordinary(__m512 v, bf16_t) {
    const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7f800000));
    const __m512 power = _mm512_castsi512_ps(exponent);
    const __m512 sum = _mm512_fmadd_ps(power, _mm512_set1_ps(0x1.8p16f), v);
    return _mm512_fmadd_ps(power, _mm512_set1_ps(-0x1.8p16f), sum);
  }
  template <class T>
  static void put(elem* to, __m512 v, int64_t n) {
    V::store_n(to, round_as(v, T{}), n);
  }
  template <Code C, class T>
  struct Block;
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
                           int64_t ahead) {
    for (int64_t i = 0; i < n; i += 16, ++scales) {
      fetch(codes + i / 2, ahead);
      Table<T, true>(values, *scales, nullptr).template lookup_16<High>(to + i, codes + i / 2);
    }
  }

  template <class T, bool Ordinary>
  struct Table {
    __m512 numbers;

    Table(const float* values, float scale, const float* zero) {
      numbers = scaled(values, scale, zero);
      numbers = Ordinary ? round_ordinary(numbers, T{}) : round_as(numbers, T{});
    }
    float at(int i) const {
      alignas(64) float all[16];
      _mm512_store_ps(all, numbers);
      return all[i];
    }
    // Only the low four bits of an index count.
    template <bool High>
    __m512 numbers_of(__m128i codes) const {
      const __m512i pairs = _mm512_cvtepu8_epi64(codes);
      const __m512i index = High ? _mm512_or_si512(_mm512_srli_epi64(pairs, 4), _mm512_slli_epi64(pairs, 32))
                                 : _mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28));
      return _mm512_permutexvar_ps(index, numbers);
    }
    template <bool High>
    void lookup_16(elem* to, const uint8_t* codes) const {
      V::store(to, numbers_of<High>(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
    }
    template <bool High>
    void lookup_32(elem* to, const uint8_t* codes) const {
      lookup_16<High>(to, codes);
      lookup_16<High>(to + 16, codes + 8);
    }
    template <bool High>
    void lookup(elem* to, const uint8_t* codes, int64_t n) const {
      int64_t i = 0;
      for (; i + 16 <= n; i += 16) lookup_16<High>(to + i, codes + i / 2);
      if (i < n) V::store_n(to + i, numbers_of<High>(load_bytes(codes + i / 2, (n - i + 1) / 2)), n - i);
    }
  };
};

template <class T>
struct Avx512Unpack::Block<Code::int8, T> {
  static constexpr int64_t kColumns = 32;
  __m512 factor;

  explicit Block(float scale) : factor(_mm512_set1_ps(scale)) {}
  void operator()(elem* to, const uint8_t* codes) const {
    for (int i = 0; i < kColumns; i += 16)
      V::store(to + i, round_ordinary(_mm512_mul_ps(bytes<Code::int8>(codes + i, 16), factor), T{}));
  }
};

template <class T>
struct Avx512Unpack::Block<Code::e4m3, T> {
  static constexpr bool kScaled = __is_same(T, bf16_t);  // the tables' numbers are
  static constexpr int64_t kColumns = Bytes64::kBytes;
  E4m3Codes<Bytes64> codes_of;
  __m512 factor;

  static bool takes(float scale) { return scale != 0; }
  explicit Block(float scale) : codes_of(E4m3Numbers(kScaled ? scale : 1.0f)), factor(_mm512_set1_ps(scale)) {}
  bool failed() { return codes_of.met_nan(); }
  [[gnu::always_inline]] void operator()(elem* to, const uint8_t* codes) {
    const auto put = [&](__m512i words, int at) __attribute__((always_inline)) {
      const __m512 v = _mm512_castsi512_ps(words);
      V::store(to + at, kScaled ? v : round_as(_mm512_mul_ps(v, factor), T{}));
    };
    __m512i low, high;
    codes_of.bytes(codes, low, high);
    const __m512i none = _mm512_setzero_si512();
    const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    put(_mm512_unpacklo_epi16(none, first), 0);
    put(_mm512_unpackhi_epi16(none, first), 16);
    put(_mm512_unpacklo_epi16(none, second), 32);
    put(_mm512_unpackhi_epi16(none, second), 48);
  }
};

}  // namespace
