// Unpacking on AVX-512: to fp32, or to bf16 for its dot products.
#pragma once

#include "ukernel/unpack.inl"
#include "ukernel/vec_avx512.inl"

namespace {

struct Avx512Values {
  using V = F32x16;

  static __m128i load_bytes(const uint8_t* p, int64_t n) {
    if (n == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_maskz_loadu_epi8(first16(n), p);
  }
  // E4M3 as half precision of the 256th part, which has room for it: its exponent begins 8 earlier.
  static __m512i as_halves(__m256i bytes) {
    const __m512i wide = _mm512_cvtepu8_epi16(bytes);
    // Adding it once more moves the sign up.
    const __m512i half = _mm512_slli_epi16(_mm512_add_epi16(wide, _mm512_and_si512(wide, _mm512_set1_epi16(0x80))), 7);
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_add_epi16(half, half), _mm512_set1_epi16(0x7f00));
    return _mm512_mask_blend_epi16(nan, half, _mm512_set1_epi16(0x7e00));
  }
  static __m512 low_numbers(__m512i halves) { return _mm512_cvtph_ps(_mm512_castsi512_si256(halves)); }
  static __m512 high_numbers(__m512i halves) {
    return _mm512_cvtph_ps(_mm256_castps_si256(_mm512_extractf32x8_ps(_mm512_castsi512_ps(halves), 1)));
  }
  static __m512 from_e4m3(__m128i bytes) {
    return _mm512_mul_ps(low_numbers(as_halves(_mm256_castsi128_si256(bytes))), _mm512_set1_ps(256.0f));
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
  static constexpr int64_t kBlock = 32;
  template <Code C>
  static __m512 block_factor(float scale) {
    return _mm512_set1_ps(C == Code::int8 ? scale : 256.0f * scale);
  }
  // So many bytes as numbers times scale: ordinary ones.
  template <Code C>
  static void scaled_block(const uint8_t* codes, __m512 factor, __m512& low, __m512& high) {
    if constexpr (C == Code::int8) {
      low = _mm512_mul_ps(bytes<C>(codes, 16), factor);
      high = _mm512_mul_ps(bytes<C>(codes + 16, 16), factor);
    } else {
      const __m512i halves = as_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      low = _mm512_mul_ps(low_numbers(halves), factor);
      high = _mm512_mul_ps(high_numbers(halves), factor);
    }
  }
};

struct Avx512Unpack : Avx512Values {
  using elem = float;

  static __m512 round_as(__m512 v, float) { return v; }
  static __m512 round_as(__m512 v, bf16_t) {
    return _mm512_castsi512_ps(_mm512_and_si512(rounding_to_bf16(v), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static __m512 round_as(__m512 v, f16_t) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  // The same for ordinary products: a number so much larger leaves 8 bits of the significand when it is added.
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
  static void block(elem* to, const uint8_t* codes, __m512 factor) {
    __m512 low, high;
    scaled_block<C>(codes, factor, low, high);
    V::store(to, round_ordinary(low, T{}));
    V::store(to + 16, round_ordinary(high, T{}));
  }

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

struct Bf16Unpack : Avx512Values {
  using elem = bf16_t;
  template <class, bool Ordinary>
  struct Table;

  template <class>
  static void put(elem* to, __m512 v, int64_t n) {
    _mm256_mask_storeu_epi16(to, first16(n), to_bf16(v));
  }
  // Ordinary numbers.
  static __m512i both_to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

  template <Code C, class>
  static void block(elem* to, const uint8_t* codes, __m512 factor) {
    __m512 low, high;
    scaled_block<C>(codes, factor, low, high);
    _mm512_storeu_si512(to, both_to_bf16(low, high));
  }

  // A word with a byte of codes in its lower half for every second number. Only the low five bits of an index count.
  template <bool High>
  static __m512i index_of(__m512i pairs) {
    return High ? _mm512_or_si512(_mm512_srli_epi32(pairs, 4), _mm512_slli_epi32(pairs, 16))
                : _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
  }
  static __m512i pairs_at(const uint8_t* codes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  }

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
  // Two groups' numbers in one table.
  template <class, bool High>
  static void small_groups(elem* to, const uint8_t* codes, const float* values, const float* scales, int64_t n,
                           int64_t ahead) {
    const __m512 all = _mm512_loadu_ps(values);
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    for (int64_t i = 0; i < n; i += 32, scales += 2) {
      fetch(codes + i / 2, ahead);
      const __m512i table =
          both_to_bf16(_mm512_mul_ps(all, _mm512_set1_ps(scales[0])), _mm512_mul_ps(all, _mm512_set1_ps(scales[1])));
      const __m512i code = _mm512_and_si512(index_of<High>(pairs_at(codes + i / 2)), _mm512_set1_epi16(15));
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(_mm512_or_si512(code, second), table));
    }
  }

  template <class, bool Ordinary>
  struct Table {
    __m512i numbers;  // twice

    Table(const float* values, float scale, const float* zero) {
      const __m512 all = scaled(values, scale, zero);
      numbers = Ordinary ? both_to_bf16(all, all) : _mm512_broadcast_i64x4(to_bf16(all));
    }
    bf16_t at(int i) const {
      alignas(64) bf16_t all[32];
      _mm512_store_si512(all, numbers);
      return all[i];
    }
    template <bool High>
    void lookup_32(elem* to, const uint8_t* codes) const {
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index_of<High>(pairs_at(codes)), numbers));
    }
    template <bool High>
    void lookup(elem* to, const uint8_t* codes, int64_t n) const {
      int64_t i = 0;
      for (; i + 32 <= n; i += 32) lookup_32<High>(to + i, codes + i / 2);
      if (i == n) return;
      const __m512i pairs = _mm512_cvtepu8_epi32(load_bytes(codes + i / 2, (n - i + 1) / 2));
      _mm512_mask_storeu_epi16(to + i, (1u << (n - i)) - 1u, _mm512_permutexvar_epi16(index_of<High>(pairs), numbers));
    }
  };
};

// Lines of two rows: lane j is (a[j], b[j]).
struct Bf16Lines {
  using U = Bf16Unpack;

  // The numbers of both rows of a group.
  static __m512i table(const float* values, float a, float b) {
    const __m512 all = _mm512_loadu_ps(values);
    return U::both_to_bf16(_mm512_mul_ps(all, _mm512_set1_ps(a)), _mm512_mul_ps(all, _mm512_set1_ps(b)));
  }
  static __m512i table(const float* values, float a, float b, float zero_a, float zero_b) {
    return U::both_to_bf16(U::scaled(values, a, &zero_a), U::scaled(values, b, &zero_b));
  }
  // In words: row a's codes below row b's, with what tells b's numbers from a's.
  static __m512i index(__m512i codes) {
    return _mm512_or_si512(_mm512_and_si512(codes, _mm512_set1_epi32(0x000f000f)), _mm512_set1_epi32(0x00100000));
  }

  // 32 lanes. `to`, of lanes as pairs.
  template <bool High>
  static void nibbles_32(bf16_t* to, const uint8_t* a, const uint8_t* b, __m512i table) {
    const __m512i both = _mm512_or_si512(U::pairs_at(a), _mm512_slli_epi32(U::pairs_at(b), 16));
    const __m512i high = _mm512_permutexvar_epi16(index(_mm512_srli_epi32(both, 4)), table);
    const __m512i low = _mm512_permutexvar_epi16(index(both), table);
    const __m512i even = High ? high : low, odd = High ? low : high;
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi32(even, first, odd));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi32(even, second, odd));
  }
  template <bool High>
  static void nibbles_16(bf16_t* to, const uint8_t* a, const uint8_t* b, __m512i table) {
    const auto wide = [](const uint8_t* p) {
      return _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    };
    const __m512i both = _mm512_or_si512(wide(a), _mm512_slli_epi64(wide(b), 16));
    const __m512i codes = High ? _mm512_or_si512(_mm512_srli_epi64(both, 4), _mm512_slli_epi64(both, 32))
                               : _mm512_or_si512(both, _mm512_slli_epi64(both, 28));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index(codes), table));
  }
  template <Code C>
  static void bytes_16(bf16_t* to, const uint8_t* a, const uint8_t* b, __m512 factor_a, __m512 factor_b) {
    __m512 first, second;
    const __m128i at_a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    const __m128i at_b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    if constexpr (C == Code::int8) {
      first = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(at_a)), factor_a);
      second = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(at_b)), factor_b);
    } else {
      const __m512i halves = U::as_halves(_mm256_set_m128i(at_b, at_a));
      first = _mm512_mul_ps(U::low_numbers(halves), factor_a);
      second = _mm512_mul_ps(U::high_numbers(halves), factor_b);
    }
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, U::both_to_bf16(first, second)));
  }

  // Lanes [column, stop) of one group, in sixteens.
  template <Code C>
  [[gnu::always_inline]] static void group(const UnpackArgs& args, const PackedRow<bf16_t>& a,
                                           const PackedRow<bf16_t>& b, int64_t g, int64_t column, int64_t stop,
                                           bf16_t* line) {
    if constexpr (moelora::bits_of(C) == 8) {
      const __m512 factor_a = U::block_factor<C>(a.scale[g]), factor_b = U::block_factor<C>(b.scale[g]);
      for (; column < stop; column += 16) {
        fetch(a.codes + column, args.ahead);
        fetch(b.codes + column, args.ahead);
        bytes_16<C>(line + 2 * column, a.codes + column, b.codes + column, factor_a, factor_b);
      }
    } else {
      constexpr bool kHigh = C == Code::nibbles_high;
      const __m512i numbers = a.zero ? table(args.values, a.scale[g], b.scale[g], a.zero[g], b.zero[g])
                                     : table(args.values, a.scale[g], b.scale[g]);
      for (; column + 32 <= stop; column += 32) {
        fetch(a.codes + column / 2, args.ahead);
        fetch(b.codes + column / 2, args.ahead);
        nibbles_32<kHigh>(line + 2 * column, a.codes + column / 2, b.codes + column / 2, numbers);
      }
      if (column < stop) nibbles_16<kHigh>(line + 2 * column, a.codes + column / 2, b.codes + column / 2, numbers);
    }
  }

  // Columns [first, args.first + args.n), any scales; b: null where there is no second row.
  template <Code C>
  static void rest(const UnpackArgs& args, int64_t first, const UnpackArgs& a, bool has_b, bf16_t* line) {
    constexpr int64_t kSome = 64;
    bf16_t rows[2][kSome] = {};
    for (const int64_t end = args.first + args.n; first < end; first += kSome) {
      UnpackArgs part = a;
      const int64_t groups = first / args.group - args.first / args.group;
      part.rows = has_b ? 2 : 1;
      part.first = first;
      part.n = end - first < kSome ? end - first : kSome;
      part.scale += groups;
      if (part.zero) part.zero += groups;
      part.to = rows;
      part.to_stride = sizeof(rows[0]);
      part.ahead = 0;
      unpack<U, bf16_t, C>(part);
      for (int64_t j = 0; j < part.n; ++j) {
        line[2 * (first + j)] = rows[0][j];
        line[2 * (first + j) + 1] = rows[1][j];
      }
    }
  }

  template <Code C>
  static void unpack_lines(const UnpackArgs& given) {
    const UnpackArgs args = given;  // not in memory that stores might change
    const int64_t first_group = args.first / args.group;
    const bool aligned =
        args.ordinary && args.first % 16 == 0 && (args.group % 16 == 0 || args.group >= args.first + args.n);
    for (int64_t p = 0; p < args.rows; p += 2) {
      const bool has_b = p + 1 < args.rows;
      const PackedRow<bf16_t> a(args, p, first_group), b(args, has_b ? p + 1 : p, first_group);
      bf16_t* line = reinterpret_cast<bf16_t*>(static_cast<char*>(args.to) + p / 2 * args.to_stride) - 2 * args.first;
      const int64_t whole = aligned && has_b ? args.n / 16 * 16 : 0;
      UnpackArgs sixteens = args;
      sixteens.n = whole;
      for_each_group(sixteens, first_group, args.first,
                     [&](int64_t g, int64_t column, int64_t stop)
                         __attribute__((always_inline)) { group<C>(args, a, b, g, column, stop, line); });
      if (whole == args.n) continue;
      UnpackArgs rows = args;
      rows.codes = a.codes;
      rows.scale = a.scale;
      rows.zero = a.zero;
      rest<C>(args, args.first + whole, rows, has_b, line);
    }
  }

  static void fill(moelora::Kernels& k) {
    const auto at = [&](Code code) -> auto& {
      return k.unpack_lines[static_cast<int>(code)][static_cast<int>(moelora::DType::bf16)];
    };
    at(Code::nibbles_high) = unpack_lines<Code::nibbles_high>;
    at(Code::nibbles_low) = unpack_lines<Code::nibbles_low>;
    at(Code::int8) = unpack_lines<Code::int8>;
    at(Code::e4m3) = unpack_lines<Code::e4m3>;
  }
};

}  // namespace
