// Unpacking over an unpack policy. Include inside an instruction set's unit only. Its units are compiled without
// contraction: products and sums are rounded one by one, unless fused by name.
//
// U: V (the vector policy), elem (compute type), bytes<Code or ScaleType>(const uint8_t*, n): V::lanes bytes as
// numbers,
//    those from n on are not read
//    canonical(vec): NaN as one that stays NaN however it is rounded
//    ordinary(vec): whether all are ordinary scales
//    put<T>(elem*, vec, n): rounded to T, as the compute type
//    Table<T, Ordinary>(const float* values, scale, const float* zero): 16 numbers, rounded to T, with
//        at(i), lookup<High>(elem* to, const uint8_t* codes, n): those that n nibbles say
// and where it has faster ways if scales are ordinary
//    kBlock, block<C, T>(elem*, const uint8_t*, scale): so many bytes
//    kSmallGroup, small_groups<T, High>(elem*, const uint8_t*, const float* values, const float* scales, n): nibbles of
//        groups so small, n a multiple of 32
#pragma once

#include "ukernel/gather.inl"
#include "ukernel/ukernel.h"

namespace {

using moelora::Code;
using moelora::ScaleType;
using moelora::UnpackArgs;

// One row of what is unpacked, from column 0 on; scales from the first group wanted on.
template <class elem>
struct PackedRow {
  const uint8_t* codes;
  const float *scale, *zero;
  elem* to;
  int64_t first_group;

  PackedRow(const UnpackArgs& args, int64_t row, int64_t group)
      : codes(args.codes + row * args.codes_stride),
        scale(args.scale + row * args.scale_stride),
        zero(args.zero ? args.zero + row * args.scale_stride : nullptr),
        to(reinterpret_cast<elem*>(static_cast<char*>(args.to) + row * args.to_stride) - args.first),
        first_group(group) {}
};

// Codes of one row that will be wanted soon.
template <int Bits>
void fetch_ahead(const UnpackArgs& args, const uint8_t* codes) {
  if (args.ahead == 0) return;
  const uint8_t* end = codes + (args.first + args.n) * Bits / 8;
  for (const uint8_t* at = codes + args.first * Bits / 8; at < end; at += 64) __builtin_prefetch(at + args.ahead, 0, 2);
}

// Calls part(group, column, end of the columns in it) for each group of columns [column, end); groups count from that
// of args.first.
template <class Part>
[[gnu::always_inline]] inline void for_each_group(const UnpackArgs& args, int64_t first_group, int64_t column,
                                                    const Part& part) {
  const int64_t end = args.first + args.n;
  int64_t group = column == args.first ? 0 : column / args.group - first_group;
  int64_t stop = (first_group + group + 1) * args.group;
  for (; column < end; ++group, column = stop, stop += args.group) part(group, column, stop < end ? stop : end);
}

template <class U, class T, bool High, bool Ordinary>
void unpack_nibble_row(const UnpackArgs& args, const PackedRow<typename U::elem>& row) {
  int64_t first = args.first;
  if constexpr (Ordinary && requires { U::kSmallGroup; })
    if (args.group == U::kSmallGroup && first % args.group == 0 && row.zero == nullptr) {
      const int64_t n = args.n / 32 * 32;
      U::template small_groups<T, High>(row.to + first, row.codes + first / 2, args.values, row.scale, n);
      if (n == args.n) return;
      first += n;
    }
  for_each_group(args, row.first_group, first, [&](int64_t group, int64_t column, int64_t stop) __attribute__((always_inline)) {
    const typename U::template Table<T, Ordinary> table(args.values, row.scale[group],
                                                        row.zero ? row.zero + group : nullptr);
    if (column % 2 != 0) {
      row.to[column] = table.at(High ? row.codes[column / 2] & 15 : row.codes[column / 2] >> 4);
      ++column;
    }
    table.template lookup<High>(row.to + column, row.codes + column / 2, stop - column);
  });
}

template <class U, class T, Code C, bool Ordinary>
void unpack_byte_row(const UnpackArgs& args, const PackedRow<typename U::elem>& row) {
  using V = typename U::V;
  for_each_group(args, row.first_group, args.first, [&](int64_t group, int64_t column, int64_t stop) __attribute__((always_inline)) {
    if constexpr (Ordinary && requires { U::kBlock; })
      for (; column + U::kBlock <= stop; column += U::kBlock)
        U::template block<C, T>(row.to + column, row.codes + column, row.scale[group]);
    const typename V::vec scale = V::set1(row.scale[group]);
    for (; column < stop; column += V::lanes) {
      const int64_t n = stop - column < V::lanes ? stop - column : V::lanes;
      U::template put<T>(row.to + column, V::mul(U::template bytes<C>(row.codes + column, n), scale), n);
    }
  });
}

template <class U, class T, Code C, bool Ordinary>
[[gnu::always_inline]] inline void unpack_row(const UnpackArgs& args, const PackedRow<typename U::elem>& row) {
  if constexpr (moelora::bits_of(C) == 4)
    unpack_nibble_row<U, T, C == Code::nibbles_high, Ordinary>(args, row);
  else
    unpack_byte_row<U, T, C, Ordinary>(args, row);
}

template <class U, class T, Code C>
void unpack(const UnpackArgs& args) {
  const int64_t first_group = args.first / args.group;
  for (int64_t i = 0; i < args.rows; ++i) {
    const PackedRow<typename U::elem> row(args, i, first_group);
    fetch_ahead<moelora::bits_of(C)>(args, row.codes);
    args.ordinary ? unpack_row<U, T, C, true>(args, row) : unpack_row<U, T, C, false>(args, row);
  }
}

// Scales of V's own storage types.
template <class U, class T>
bool widen_scales(const moelora::ScaleArgs& args) {
  using V = typename U::V;
  T buffer[V::lanes];
  bool ordinary = true;
  for (int64_t row = 0; row < args.rows; ++row) {
    const T* from = static_cast<const T*>(args.from) + row * args.row_stride;
    for (int64_t i = 0; i < args.n; i += V::lanes) {
      const int64_t n = args.n - i < V::lanes ? args.n - i : V::lanes;
      const auto v = U::canonical(V::load_n(gathered(buffer, from + i * args.stride, args.stride, n), n));
      ordinary &= U::ordinary(v);
      V::store_n(args.to + row * args.to_stride + i, v, n);
    }
  }
  return ordinary;
}

// Scales of a byte each.
template <class U, ScaleType S>
bool decode_scales(const moelora::ScaleArgs& args) {
  using V = typename U::V;
  uint8_t buffer[V::lanes];
  const typename V::vec factor = V::set1(args.factor), offset = V::set1(args.offset);
  bool ordinary = true;
  for (int64_t row = 0; row < args.rows; ++row) {
    const auto* from = static_cast<const uint8_t*>(args.from) + row * args.row_stride;
    for (int64_t i = 0; i < args.n; i += V::lanes) {
      const int64_t n = args.n - i < V::lanes ? args.n - i : V::lanes;
      const uint8_t* bytes = gathered(buffer, from + i * args.stride, args.stride, n);
      typename V::vec v;
      if constexpr (S == ScaleType::indexed) {
        float picked[V::lanes];
        for (int64_t j = 0; j < n; ++j) picked[j] = args.values[bytes[j]];
        v = V::add(V::mul(V::load_n(picked, n), factor), offset);
      } else {
        v = U::template bytes<S>(bytes, n);
        if constexpr (S == ScaleType::e4m3) v = V::mul(v, factor);
      }
      v = U::canonical(v);
      V::store_n(args.to + row * args.to_stride + i, v, n);
      // Those from n on are no scales.
      ordinary &= U::ordinary(n < V::lanes ? V::load_n(args.to + row * args.to_stride + i, n) : v);
    }
  }
  return ordinary;
}

template <class U>
void fill_scales(moelora::Kernels& k) {
  const auto at = [&](ScaleType type) -> auto& { return k.scales[static_cast<int>(type)]; };
  at(ScaleType::f32) = widen_scales<U, float>;
  at(ScaleType::bf16) = widen_scales<U, moelora::bf16_t>;
  at(ScaleType::f16) = widen_scales<U, moelora::f16_t>;
  at(ScaleType::e8m0) = decode_scales<U, ScaleType::e8m0>;
  at(ScaleType::e4m3) = decode_scales<U, ScaleType::e4m3>;
  at(ScaleType::u8) = decode_scales<U, ScaleType::u8>;
  at(ScaleType::indexed) = decode_scales<U, ScaleType::indexed>;
}

// For weights that stand for ones of type T.
template <class U, class T>
void fill_unpack(moelora::Kernels& k, moelora::DType type) {
  const auto fill = [&](auto& to) {
    const auto at = [&](Code code) -> auto& { return to[static_cast<int>(code)][static_cast<int>(type)]; };
    at(Code::nibbles_high) = unpack<U, T, Code::nibbles_high>;
    at(Code::nibbles_low) = unpack<U, T, Code::nibbles_low>;
    at(Code::int8) = unpack<U, T, Code::int8>;
    at(Code::e4m3) = unpack<U, T, Code::e4m3>;
  };
  fill(k.unpack);
  fill(k.unpack_lines);
}

template <class U>
void fill_f32_unpack(moelora::Kernels& k) {
  fill_scales<U>(k);
  fill_unpack<U, moelora::bf16_t>(k, moelora::DType::bf16);
  fill_unpack<U, moelora::f16_t>(k, moelora::DType::f16);
  fill_unpack<U, float>(k, moelora::DType::f32);
}

}  // namespace
