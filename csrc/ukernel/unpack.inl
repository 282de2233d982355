// Unpacking over an unpack policy. Include inside an instruction set's unit only. Its units are compiled without
// contraction: products and sums are rounded one by one.
//
// U: V (the vector policy), elem (compute type), bytes<Code or ScaleType>(const uint8_t*, n): V::lanes bytes as
// numbers,
//    those from n on are not read
//    canonical(vec): NaN as one that stays NaN however it is rounded
//    put<T>(elem*, vec, n): rounded to T, as the compute type
//    Table<T>(const float* values, scale, const float* zero): 16 numbers, rounded to T, with
//        at(i), lookup<High>(elem* to, const uint8_t* codes, n): those that n nibbles say
#pragma once

#include "ukernel/gather.inl"
#include "ukernel/ukernel.h"

namespace {

using moelora::Code;
using moelora::ScaleType;

// Calls part(group, column, end of the columns in it) for each group of the columns.
template <class Part>
[[gnu::always_inline]] inline void for_each_group(const moelora::UnpackArgs& args, const Part& part) {
  const int64_t end = args.first + args.n, first_group = args.first / args.group;
  int64_t column = args.first;
  for (int64_t group = first_group; column < end; ++group) {
    int64_t stop = (group + 1) * args.group;
    if (stop > end) stop = end;
    part(group - first_group, column, stop);
    column = stop;
  }
}

template <class U, class T, bool High>
void unpack_nibbles(const moelora::UnpackArgs& args) {
  auto* to = static_cast<typename U::elem*>(args.to) - args.first;
  for_each_group(args, [&](int64_t group, int64_t column, int64_t stop) {
    const typename U::template Table<T> table(args.values, args.scale[group], args.zero ? args.zero + group : nullptr);
    if (column % 2 != 0) {
      to[column] = table.at(High ? args.codes[column / 2] & 15 : args.codes[column / 2] >> 4);
      ++column;
    }
    table.template lookup<High>(to + column, args.codes + column / 2, stop - column);
  });
}

template <class U, class T, Code C>
void unpack_bytes(const moelora::UnpackArgs& args) {
  using V = typename U::V;
  auto* to = static_cast<typename U::elem*>(args.to) - args.first;
  for_each_group(args, [&](int64_t group, int64_t column, int64_t stop) {
    const typename V::vec scale = V::set1(args.scale[group]);
    for (; column + V::lanes <= stop; column += V::lanes)
      U::template put<T>(to + column, V::mul(U::template bytes<C>(args.codes + column, V::lanes), scale), V::lanes);
    if (column < stop)
      U::template put<T>(to + column, V::mul(U::template bytes<C>(args.codes + column, stop - column), scale),
                         stop - column);
  });
}

// Scales of V's own storage types.
template <class U, class T>
void widen_scales(const moelora::ScaleArgs& args) {
  using V = typename U::V;
  T buffer[V::lanes];
  const T* from = static_cast<const T*>(args.from);
  for (int64_t i = 0; i < args.n; i += V::lanes) {
    const int64_t n = args.n - i < V::lanes ? args.n - i : V::lanes;
    V::store_n(args.to + i, U::canonical(V::load_n(gathered(buffer, from + i * args.stride, args.stride, n), n)), n);
  }
}

// Scales of a byte each.
template <class U, ScaleType S>
void decode_scales(const moelora::ScaleArgs& args) {
  using V = typename U::V;
  uint8_t buffer[V::lanes];
  const auto* from = static_cast<const uint8_t*>(args.from);
  const typename V::vec factor = V::set1(args.factor), offset = V::set1(args.offset);
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
    V::store_n(args.to + i, U::canonical(v), n);
  }
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
  const auto at = [&](Code code) -> auto& { return k.unpack[static_cast<int>(code)][static_cast<int>(type)]; };
  at(Code::nibbles_high) = unpack_nibbles<U, T, true>;
  at(Code::nibbles_low) = unpack_nibbles<U, T, false>;
  at(Code::int8) = unpack_bytes<U, T, Code::int8>;
  at(Code::e4m3) = unpack_bytes<U, T, Code::e4m3>;
}

template <class U>
void fill_f32_unpack(moelora::Kernels& k) {
  fill_scales<U>(k);
  fill_unpack<U, moelora::bf16_t>(k, moelora::DType::bf16);
  fill_unpack<U, moelora::f16_t>(k, moelora::DType::f16);
  fill_unpack<U, float>(k, moelora::DType::f32);
}

}  // namespace
