// Unpacking on AVX-512 to bf16 for its dot products: rows, and lines of two rows.
#pragma once

#include "ukernel/unpack_avx512.inl"

namespace {

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

  template <Code C, class T>
  struct Block;

  // A word with a byte of codes in its lower half for every second number. Only the low five bits of an index count.
  template <bool High>
  static __m512i index_of(__m512i pairs) {
    return High ? _mm512_or_si512(_mm512_srli_epi32(pairs, 4), _mm512_slli_epi32(pairs, 16))
                : _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
  }
  // The same of 16 bytes, in which bit 4 and those above may be anything.
  template <bool High>
  static __m512i index_32(const uint8_t* codes) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    // Each in both words of a pair; in each quarter those of its own.
    const auto twice = [](uint32_t byte) { return static_cast<int>(0x80008000u | byte << 16 | byte); };
    const __m512i order =
        _mm512_setr_epi32(twice(0), twice(1), twice(2), twice(3), twice(4), twice(5), twice(6), twice(7), twice(8),
                          twice(9), twice(10), twice(11), twice(12), twice(13), twice(14), twice(15));
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, order), _mm512_set1_epi32(High ? 4 : 4 << 16));
  }
  static __m512i pairs_at(const uint8_t* codes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  }

  // Whole groups of a multiple of 32.
  template <class T, bool High>
  static void groups(elem* to, const uint8_t* codes, const float* values, const float* scales, const float* zeros,
                     int64_t group, int64_t n, int64_t ahead) {
    if (zeros) return each_group<T, High, true>(to, codes, values, scales, zeros, group, n, ahead);
    const int64_t pairs = group == 32 ? n / 64 * 64 : 0;
    pairs_of_groups<High, 32>(to, codes, values, scales, pairs, ahead);
    each_group<T, High, false>(to + pairs, codes + pairs / 2, values, scales + pairs / group, zeros, group, n - pairs,
                               ahead);
  }
  template <class T, bool High, bool Zeros>
  [[gnu::always_inline]] static void each_group(elem* to, const uint8_t* codes, const float* values,
                                                const float* scales, const float* zeros, int64_t group, int64_t n,
                                                int64_t ahead) {
    for (const elem* end = to + n; to < end; ++scales) {
      const Table<T, true> table(values, *scales, Zeros ? zeros++ : nullptr);
      for (const elem* stop = to + group; to < stop; to += 32, codes += 16) {
        fetch(codes, ahead);
        table.template lookup_32<High>(to, codes);
      }
    }
  }

  static constexpr int64_t kSmallGroup = 16;
  template <class, bool High>
  static void small_groups(elem* to, const uint8_t* codes, const float* values, const float* scales, int64_t n,
                           int64_t ahead) {
    pairs_of_groups<High, kSmallGroup>(to, codes, values, scales, n, ahead);
  }

  // Two groups' numbers in one table: `of` has bit 4 set in the words of the second.
  template <bool High>
  static __m512i numbers_in_pair(const uint8_t* codes, __m512i of, __m512i table) {
    const __m512i code = _mm512_and_si512(index_32<High>(codes), _mm512_set1_epi16(15));
    return _mm512_permutexvar_epi16(_mm512_or_si512(code, of), table);
  }
  template <bool High>
  static void lookup_in_pair(elem* to, const uint8_t* codes, __m512i of, __m512i table) {
    _mm512_storeu_si512(to, numbers_in_pair<High>(codes, of, table));
  }
  // n: a multiple of two groups.
  template <bool High, int64_t Group>
  [[gnu::always_inline]] static void pairs_of_groups(elem* to, const uint8_t* codes, const float* values,
                                                     const float* scales, int64_t n, int64_t ahead) {
    const __m512 all = _mm512_loadu_ps(values);
    const __m512i first = _mm512_setzero_si512(), second = _mm512_set1_epi16(16);
    for (const elem* end = to + n; to < end; to += 2 * Group, codes += Group, scales += 2) {
      fetch(codes, ahead);
      const __m512i table =
          both_to_bf16(_mm512_mul_ps(all, _mm512_set1_ps(scales[0])), _mm512_mul_ps(all, _mm512_set1_ps(scales[1])));
      if constexpr (Group == 16) {
        lookup_in_pair<High>(to, codes, _mm512_inserti64x4(first, _mm512_castsi512_si256(second), 1), table);
      } else {
        lookup_in_pair<High>(to, codes, first, table);
        lookup_in_pair<High>(to + 32, codes + 16, second, table);
      }
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
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index_32<High>(codes), numbers));
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

template <class T>
struct Bf16Unpack::Block<Code::int8, T> {
  static constexpr int64_t kColumns = 32;
  __m512 factor;

  explicit Block(float scale) : factor(_mm512_set1_ps(scale)) {}
  __m512 numbers(const uint8_t* codes) const { return _mm512_mul_ps(bytes<Code::int8>(codes, 16), factor); }
  void operator()(elem* to, const uint8_t* codes) const {
    _mm512_storeu_si512(to, both_to_bf16(numbers(codes), numbers(codes + 16)));
  }
};

// Whose unpacked words are in order at once.
struct WordBytes64 : Bytes64 {
  static vec load(const uint8_t* p) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15),
                                    _mm512_loadu_si512(p));
  }
};

template <class T>
struct Bf16Unpack::Block<Code::e4m3, T> {
  static constexpr int64_t kColumns = WordBytes64::kBytes;
  E4m3Codes<WordBytes64> codes_of;

  static bool takes(float scale) { return scale != 0; }
  explicit Block(float scale) : codes_of(E4m3Numbers(scale)) {}
  bool failed() { return codes_of.met_nan(); }
  [[gnu::always_inline]] void operator()(elem* to, const uint8_t* codes) {
    __m512i low, high;
    codes_of.bytes(codes, low, high);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi8(low, high));
  }
};

// Whether all rows have the same scales, none of which is 0.
inline bool scales_alike(const UnpackArgs& args) {
  const int64_t groups = (args.first + args.n - 1) / args.group - args.first / args.group + 1;
  int unlike = 0;
  for (int64_t g = 0; g < groups; ++g) unlike |= args.scale[g] == 0;
  for (int64_t p = 1; p < args.rows; ++p)
    for (int64_t g = 0; g < groups; ++g) unlike |= args.scale[p * args.scale_stride + g] != args.scale[g];
  return unlike == 0;
}

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

  static __m512i byte_pairs(const uint8_t* a, const uint8_t* b) {
    return _mm512_or_si512(U::pairs_at(a), _mm512_slli_epi32(U::pairs_at(b), 16));
  }
  // 32 lanes, in two vectors. both: in words, row a's byte of two columns and row b's.
  template <bool High>
  static void nibbles_32(__m512i* first, __m512i* second, __m512i both, __m512i table) {
    const __m512i high = _mm512_permutexvar_epi16(index(_mm512_srli_epi32(both, 4)), table);
    const __m512i low = _mm512_permutexvar_epi16(index(both), table);
    const __m512i even = High ? high : low, odd = High ? low : high;
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *first = _mm512_permutex2var_epi32(even, order, odd);
    *second = _mm512_permutex2var_epi32(even, _mm512_add_epi32(order, _mm512_set1_epi32(8)), odd);
  }
  template <bool High>
  static void nibbles_32(bf16_t* to, const uint8_t* a, const uint8_t* b, __m512i table) {
    __m512i line[2];
    nibbles_32<High>(&line[0], &line[1], byte_pairs(a, b), table);
    put(to, line);
  }
  // 64 lanes of one group.
  template <bool High>
  static void nibbles_64(__m512i (&line)[4], const uint8_t* a, const uint8_t* b, __m512i table) {
    const __m256i all_a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    const __m256i all_b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    // Bytes 0 to 7 and 16 to 23, and the others.
    const __m512i outer = _mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(all_a, all_b));
    const __m512i inner = _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(all_a, all_b));
    nibbles_32<High>(&line[0], &line[2], outer, table);
    nibbles_32<High>(&line[1], &line[3], inner, table);
  }
  // 16 lanes.
  template <bool High>
  static __m512i nibbles_16(const uint8_t* a, const uint8_t* b, __m512i table) {
    const auto wide = [](const uint8_t* p) {
      return _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    };
    const __m512i both = _mm512_or_si512(wide(a), _mm512_slli_epi64(wide(b), 16));
    const __m512i codes = High ? _mm512_or_si512(_mm512_srli_epi64(both, 4), _mm512_slli_epi64(both, 32))
                               : _mm512_or_si512(both, _mm512_slli_epi64(both, 28));
    return _mm512_permutexvar_epi16(index(codes), table);
  }
  template <Code C>
  static __m512i bytes_16(const uint8_t* a, const uint8_t* b, __m512 factor_a, __m512 factor_b) {
    const __m512 first = _mm512_mul_ps(U::bytes<C>(a, 16), factor_a);
    const __m512 second = _mm512_mul_ps(U::bytes<C>(b, 16), factor_b);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, U::both_to_bf16(first, second));
  }
  // Vectors of lanes as pairs.
  template <int NV>
  static void put(bf16_t* to, const __m512i (&line)[NV]) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) _mm512_storeu_si512(to + 32 * v, line[v]);
  }

  // Lanes [column, stop) of one group, in sixteens.
  template <Code C>
  [[gnu::always_inline]] static void group(const UnpackArgs& args, const PackedRow<bf16_t>& a,
                                           const PackedRow<bf16_t>& b, int64_t g, int64_t column, int64_t stop,
                                           bf16_t* line) {
    if constexpr (moelora::bits_of(C) == 8) {
      const __m512 factor_a = _mm512_set1_ps(a.scale[g]), factor_b = _mm512_set1_ps(b.scale[g]);
      while (column < stop) {
        fetch(a.codes + column, args.ahead);
        fetch(b.codes + column, args.ahead);
        for (const int64_t end = column + 64 < stop ? column + 64 : stop; column < end; column += 16)
          _mm512_storeu_si512(line + 2 * column, bytes_16<C>(a.codes + column, b.codes + column, factor_a, factor_b));
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
      if (column == stop) return;
      fetch(a.codes + column / 2, args.ahead);
      fetch(b.codes + column / 2, args.ahead);
      _mm512_storeu_si512(line + 2 * column, nibbles_16<kHigh>(a.codes + column / 2, b.codes + column / 2, numbers));
    }
  }

  // As many of the first n columns as are whole groups of nibbles, of a multiple of 32. How many.
  template <bool High, bool Zeros>
  [[gnu::always_inline]] static int64_t run_of_groups(const UnpackArgs& args, const PackedRow<bf16_t>& a,
                                                      const PackedRow<bf16_t>& b, int64_t n, bf16_t* line) {
    if (args.first % args.group != 0 || args.group % 32 != 0) return 0;
    const uint8_t *codes_a = a.codes + args.first / 2, *codes_b = b.codes + args.first / 2;
    bf16_t* to = line + 2 * args.first;
    const int64_t groups = n / args.group;
    for (int64_t g = 0; g < groups; ++g) {
      const __m512i numbers = Zeros ? table(args.values, a.scale[g], b.scale[g], a.zero[g], b.zero[g])
                                    : table(args.values, a.scale[g], b.scale[g]);
      const uint8_t* stop = codes_a + args.group / 2;
      for (; codes_a + 32 <= stop; codes_a += 32, codes_b += 32, to += 128) {
        fetch(codes_a, args.ahead);
        fetch(codes_b, args.ahead);
        __m512i line[4];
        nibbles_64<High>(line, codes_a, codes_b, numbers);
        put(to, line);
      }
      for (; codes_a < stop; codes_a += 16, codes_b += 16, to += 64) {
        fetch(codes_a, args.ahead);
        fetch(codes_b, args.ahead);
        nibbles_32<High>(to, codes_a, codes_b, numbers);
      }
    }
    return groups * args.group;
  }
  // The first n columns, in sixteens.
  template <Code C>
  [[gnu::always_inline]] static void whole_groups(UnpackArgs args, const PackedRow<bf16_t>& a,
                                                  const PackedRow<bf16_t>& b, int64_t n, bf16_t* line) {
    int64_t done = 0;
    if constexpr (moelora::bits_of(C) == 4) {
      constexpr bool kHigh = C == Code::nibbles_high;
      done =
          a.zero ? run_of_groups<kHigh, true>(args, a, b, n, line) : run_of_groups<kHigh, false>(args, a, b, n, line);
    }
    args.n = n;
    for_each_group(args, a.first_group, args.first + done,
                   [&](int64_t g, int64_t column, int64_t stop)
                       __attribute__((always_inline)) { group<C>(args, a, b, g, column, stop, line); });
  }
  // The same of groups of sixteen nibbles, without zeros.
  template <bool High>
  static void small_groups(const UnpackArgs& args, const PackedRow<bf16_t>& a, const PackedRow<bf16_t>& b, int64_t n,
                           bf16_t* line) {
    const uint8_t *codes_a = a.codes + args.first / 2, *codes_b = b.codes + args.first / 2;
    bf16_t* to = line + 2 * args.first;
    for (int64_t g = 0; g < n / 16; ++g, codes_a += 8, codes_b += 8, to += 32) {
      fetch(codes_a, args.ahead);
      fetch(codes_b, args.ahead);
      _mm512_storeu_si512(to, nibbles_16<High>(codes_a, codes_b, table(args.values, a.scale[g], b.scale[g])));
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

  // 64 lanes of rows of one scale.
  [[gnu::always_inline]] static void e4m3_64(__m512i (&line)[4], const uint8_t* a, const uint8_t* b,
                                             E4m3Codes<Bytes64>& of) {
    const __m512i all_a = Bytes64::load(a), all_b = Bytes64::load(b);
    __m512i low, high;
    of.bytes(_mm512_unpacklo_epi8(all_a, all_b), low, high);
    line[0] = _mm512_unpacklo_epi8(low, high);
    line[1] = _mm512_unpackhi_epi8(low, high);
    of.bytes(_mm512_unpackhi_epi8(all_a, all_b), low, high);
    line[2] = _mm512_unpacklo_epi8(low, high);
    line[3] = _mm512_unpackhi_epi8(low, high);
  }
  [[gnu::always_inline]] static void e4m3_64(__m512i (&line)[4], const uint8_t* a, const uint8_t* b,
                                             E4m3Codes<Bytes64>& of_a, E4m3Codes<Bytes64>& of_b) {
    __m512i low_a, high_a, low_b, high_b;
    of_a.bytes(a, low_a, high_a);
    of_b.bytes(b, low_b, high_b);
    const __m512i first_a = _mm512_unpacklo_epi8(low_a, high_a), second_a = _mm512_unpackhi_epi8(low_a, high_a);
    const __m512i first_b = _mm512_unpacklo_epi8(low_b, high_b), second_b = _mm512_unpackhi_epi8(low_b, high_b);
    line[0] = _mm512_unpacklo_epi16(first_a, first_b);
    line[1] = _mm512_unpackhi_epi16(first_a, first_b);
    line[2] = _mm512_unpacklo_epi16(second_a, second_b);
    line[3] = _mm512_unpackhi_epi16(second_a, second_b);
  }
  // Lanes [column, stop) of a group of rows [p, end), pairs of the same scales, as far as whole blocks go. Where to go
  // on. block(line, a, b): 64 lanes.  failed(): whether some must be unpacked in the careful way after all
  template <class Block, class Failed>
  [[gnu::always_inline]] static int64_t e4m3_blocks(const UnpackArgs& args, int64_t p, int64_t end, int64_t column,
                                                    int64_t stop, RowsAhead& ahead, const Block& block,
                                                    const Failed& failed) {
    int64_t done = column;
    for (; p < end; p += 2) {
      const uint8_t *a = args.codes + p * args.codes_stride, *b = a + args.codes_stride;
      bf16_t* line = line_of(args, p);
      for (done = column; done + 64 <= stop; done += 64) {
        ahead(a + done);
        ahead(b + done);
        __m512i lanes[4];
        block(lanes, a + done, b + done);
        put(line + 2 * done, lanes);
      }
    }
    return failed() ? column : done;
  }
  // The first n columns of all pairs of rows, in sixteens. What scales need is made once where pairs have the same, and
  // so is the question whether a code was NaN.
  static void e4m3_groups(UnpackArgs args, int64_t n) {
    args.n = n;
    const int64_t first_group = args.first / args.group, pairs_end = args.rows / 2 * 2;
    RowsAhead ahead(args, 64);
    for_each_group(args, first_group, args.first, [&](int64_t g, int64_t column, int64_t stop) {
      const auto scale = [&](int64_t p) { return args.scale[p * args.scale_stride + g]; };
      for (int64_t p = 0, end; p < pairs_end; p = end) {
        const float scale_a = scale(p), scale_b = scale(p + 1);
        for (end = p + 2; end < pairs_end && scale(end) == scale_a && scale(end + 1) == scale_b;) end += 2;
        int64_t done = column;
        if (scale_a != 0 && scale_a == scale_b) {
          E4m3Codes<Bytes64> of{E4m3Numbers(scale_a)};
          done = e4m3_blocks(
              args, p, end, column, stop, ahead,
              [&of](auto& lanes, const uint8_t* a, const uint8_t* b)
                  __attribute__((always_inline)) { e4m3_64(lanes, a, b, of); },
              [&of] { return of.met_nan(); });
        } else if (scale_a != 0 && scale_b != 0) {
          E4m3Codes<Bytes64> of_a{E4m3Numbers(scale_a)}, of_b{E4m3Numbers(scale_b)};
          done = e4m3_blocks(
              args, p, end, column, stop, ahead,
              [&](auto& lanes, const uint8_t* a, const uint8_t* b)
                  __attribute__((always_inline)) { e4m3_64(lanes, a, b, of_a, of_b); },
              [&] { return of_a.met_nan() || of_b.met_nan(); });
        }
        for (int64_t q = p; done < stop && q < end; q += 2)
          group<Code::e4m3>(args, PackedRow<bf16_t>(args, q, first_group), PackedRow<bf16_t>(args, q + 1, first_group),
                            g, done, stop, line_of(args, q));
      }
    });
  }

  // Line of rows p and p + 1, at column 0.
  static bf16_t* line_of(const UnpackArgs& args, int64_t p) {
    return reinterpret_cast<bf16_t*>(static_cast<char*>(args.to) + p / 2 * args.to_stride) - 2 * args.first;
  }

  template <Code C>
  static void unpack_lines(const UnpackArgs& given) {
    const UnpackArgs args = given;  // not in memory that stores might change
    const int64_t first_group = args.first / args.group;
    const bool aligned =
        args.ordinary && args.first % 16 == 0 && (args.group % 16 == 0 || args.group >= args.first + args.n);
    const int64_t sixteens = aligned ? args.n / 16 * 16 : 0;
    if constexpr (C == Code::e4m3) e4m3_groups(args, sixteens);
    for (int64_t p = 0; p < args.rows; p += 2) {
      const bool has_b = p + 1 < args.rows;
      const PackedRow<bf16_t> a(args, p, first_group), b(args, has_b ? p + 1 : p, first_group);
      bf16_t* line = line_of(args, p);
      const int64_t whole = has_b ? sixteens : 0;
      if constexpr (C != Code::e4m3) {
        if (moelora::bits_of(C) == 4 && args.group == U::kSmallGroup && !a.zero)
          small_groups<C == Code::nibbles_high>(args, a, b, whole, line);
        else
          whole_groups<C>(args, a, b, whole, line);
      }
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
