// Unpacking over an unpack policy. Include inside an instruction set's unit only. Its units are compiled without
// contraction: products and sums are rounded one by one, unless fused by name.
//
// U: V (the vector policy, with pick(const float* numbers, const uint8_t*): for each lane that which its byte says),
//    elem (compute type), bytes<Code or ScaleType>(const uint8_t*, n): V::lanes bytes as numbers, those from n on are
//    not read
//    canonical(vec): NaN as one that stays NaN however it is rounded
//    Sizes: add(vec), ordinary(): whether all that were added are ordinary scales
//    put<T>(elem*, vec, n): rounded to T, as the compute type
//    Table<T, Ordinary>(const float* values, scale, const float* zero): 16 numbers, rounded to T, with
//        at(i), lookup<High>(elem* to, const uint8_t* codes, n): those that n nibbles say
// and where it has faster ways if scales are ordinary
//    Block<C, T>: Block(scale), kColumns, (elem*, const uint8_t*): so many bytes; of E4M3 also takes(scale), and
//        failed(): whether those since it was last asked must be unpacked in the careful way after all
//    groups<T, High>(elem*, const uint8_t*, const float* values, const float* scales, const float* zeros, group, n,
//        ahead): nibbles of whole groups of a multiple of 32
//    kSmallGroup, small_groups<T, High>(elem*, const uint8_t*, const float* values, const float* scales, n, ahead): of
//        groups so small, n a multiple of 32
#pragma once

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

// Evenly between the work: many at once would wait for each other.
[[gnu::always_inline]] inline void fetch(const uint8_t* codes, int64_t ahead) {
  __builtin_prefetch(codes + ahead, 0, moelora::kToL1);
}

// The same of E4M3 codes, whose groups are unpacked one after the other for all rows. Rows beyond all of these are
// fetched in the order of their memory, which delivers them faster: a line for every 64 columns.
class RowsAhead {
 public:
  // unit: columns of a call, at most 64
  RowsAhead(const UnpackArgs& args, int64_t unit)
      : ahead_(args.ahead),
        skip_(args.codes_stride - args.n),
        n_(args.n),
        left_(args.ahead >= args.rows * args.codes_stride ? args.rows : 0),
        every_(64 / unit),
        at_(args.codes + args.first + args.ahead),
        end_(at_ + args.n) {}

  // codes: which are unpacked now
  [[gnu::always_inline]] void operator()(const uint8_t* codes) {
    if (left_ == 0) return beyond_ ? void() : fetch(codes, ahead_);
    if (--wait_ > 0) return;
    wait_ = every_;
    __builtin_prefetch(at_, 0, moelora::kToL1);
    at_ += 64;
    if (at_ < end_) return;
    at_ = end_ + skip_;
    end_ = at_ + n_;
    --left_;
  }

 private:
  int64_t ahead_, skip_, n_, left_, every_, wait_ = 1;
  const uint8_t *at_, *end_;
  bool beyond_ = left_ > 0;
};

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
[[gnu::always_inline]] inline void unpack_nibble_row(const UnpackArgs& args, const PackedRow<typename U::elem>& row) {
  int64_t first = args.first;
  if constexpr (Ordinary && requires { U::kSmallGroup; })
    if (first % args.group == 0) {
      const bool small = args.group == U::kSmallGroup && row.zero == nullptr;
      const int64_t unit = small ? 32 : args.group % 32 == 0 ? args.group : args.n + 1, n = args.n / unit * unit;
      if (small)
        U::template small_groups<T, High>(row.to + first, row.codes + first / 2, args.values, row.scale, n, args.ahead);
      else
        U::template groups<T, High>(row.to + first, row.codes + first / 2, args.values, row.scale, row.zero, args.group,
                                    n, args.ahead);
      if (n == args.n) return;
      first += n;
    }
  for_each_group(args, row.first_group, first,
                 [&](int64_t group, int64_t column, int64_t stop) __attribute__((always_inline)) {
                   const typename U::template Table<T, Ordinary> table(args.values, row.scale[group],
                                                                       row.zero ? row.zero + group : nullptr);
                   if (column % 2 != 0) {
                     row.to[column] = table.at(High ? row.codes[column / 2] & 15 : row.codes[column / 2] >> 4);
                     ++column;
                   }
                   table.template lookup<High>(row.to + column, row.codes + column / 2, stop - column);
                 });
}

// Columns [column, stop) of a group, as far as whole blocks go. Where to go on.
template <class Block, class elem, class Fetch>
[[gnu::always_inline]] inline int64_t unpack_blocks(Block& block, const PackedRow<elem>& row, int64_t column,
                                                    int64_t stop, const Fetch& fetch_ahead) {
  for (; column + Block::kColumns <= stop; column += Block::kColumns) {
    fetch_ahead(row.codes + column);
    block(row.to + column, row.codes + column);
  }
  return column;
}

// Columns [column, stop) of a group.
template <class U, class T, Code C>
[[gnu::always_inline]] inline void unpack_bytes(const PackedRow<typename U::elem>& row, float scale, int64_t column,
                                                int64_t stop) {
  using V = typename U::V;
  const typename V::vec factor = V::set1(scale);
  for (; column < stop; column += V::lanes) {
    const int64_t n = stop - column < V::lanes ? stop - column : V::lanes;
    U::template put<T>(row.to + column, V::mul(U::template bytes<C>(row.codes + column, n), factor), n);
  }
}

template <class U, class T, Code C, bool Ordinary>
[[gnu::always_inline]] inline void unpack_byte_row(const UnpackArgs& args, const PackedRow<typename U::elem>& row) {
  for_each_group(args, row.first_group, args.first,
                 [&](int64_t group, int64_t column, int64_t stop) __attribute__((always_inline)) {
                   const float scale = row.scale[group];
                   if constexpr (Ordinary && requires { typename U::template Block<C, T>; }) {
                     typename U::template Block<C, T> block(scale);
                     // Inlined at once: gcc drops calls of what does nothing but fetch.
                     const auto fetch_ahead = [&args](const uint8_t* codes)
                                                  __attribute__((always_inline)) { fetch(codes, args.ahead); };
                     column = unpack_blocks(block, row, column, stop, fetch_ahead);
                   }
                   unpack_bytes<U, T, C>(row, scale, column, stop);
                 });
}

template <class U, class T, Code C, bool Ordinary>
[[gnu::always_inline]] inline void unpack_row(const UnpackArgs& args, const PackedRow<typename U::elem>& row) {
  if constexpr (moelora::bits_of(C) == 4)
    unpack_nibble_row<U, T, C == Code::nibbles_high, Ordinary>(args, row);
  else
    unpack_byte_row<U, T, C, Ordinary>(args, row);
}

// Rows of ordinary scales, group by group: what a scale needs is made once where several rows have the same, and so is
// the question whether a code was NaN.
template <class U, class T>
void unpack_e4m3_groups(const UnpackArgs& args) {
  using Block = typename U::template Block<Code::e4m3, T>;
  const int64_t first_group = args.first / args.group;
  RowsAhead ahead(args, Block::kColumns);
  const auto fetch_ahead = [&ahead](const uint8_t* codes) __attribute__((always_inline)) { ahead(codes); };
  for_each_group(args, first_group, args.first, [&](int64_t group, int64_t column, int64_t stop) {
    const auto row = [&](int64_t i) { return PackedRow<typename U::elem>(args, i, first_group); };
    for (int64_t i = 0, end; i < args.rows; i = end) {
      const float scale = row(i).scale[group];
      for (end = i + 1; end < args.rows && row(end).scale[group] == scale;) ++end;
      int64_t done = column;
      if (Block::takes(scale)) {
        Block block(scale);
        for (int64_t r = i; r < end; ++r) done = unpack_blocks(block, row(r), column, stop, fetch_ahead);
        if (block.failed()) done = column;
      }
      for (int64_t r = i; done < stop && r < end; ++r) unpack_bytes<U, T, Code::e4m3>(row(r), scale, done, stop);
    }
  });
}

template <class U, class T, Code C>
void unpack(const UnpackArgs& given) {
  const UnpackArgs args = given;  // not in memory that stores might change
  const auto rows = [&args](const auto& unpack_one) __attribute__((always_inline)) {
    const int64_t first_group = args.first / args.group;
    for (int64_t i = 0; i < args.rows; ++i) unpack_one(PackedRow<typename U::elem>(args, i, first_group));
  };
  const auto careful = [&args](const auto& row)
                           __attribute__((always_inline)) { unpack_row<U, T, C, false>(args, row); };
  if (!args.ordinary) return rows(careful);
  if constexpr (C == Code::e4m3 && requires { typename U::template Block<C, T>; })
    unpack_e4m3_groups<U, T>(args);
  else
    rows([&args](const auto& row) __attribute__((always_inline)) { unpack_row<U, T, C, true>(args, row); });
}

constexpr int64_t kStagedScales = 256;

template <class T>
[[gnu::always_inline]] inline void fetch_scales(const T* at, int64_t n) {
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + i, 0, moelora::kToL1);
}

// read(from, n): n scales of type T that lie side by side, anything behind them.
template <class U, class T, class Read>
[[gnu::always_inline]] inline void read_run(const T* from, int64_t n, float* to, typename U::Sizes& sizes,
                                            const Read& read) {
  using V = typename U::V;
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    const typename V::vec v = read(from + i, V::lanes);
    sizes.add(v);
    V::store(to + i, v);
  }
  if (i == n) return;
  V::store_n(to + i, read(from + i, n - i), n - i);
  sizes.add(V::load_n(to + i, n - i));
}

// A few scales; those side by side eight bytes at a time.
template <class T>
[[gnu::always_inline]] inline void gather_scales(const T* from, int64_t stride, int64_t n, T* to) {
  constexpr int64_t kOnce = 8 / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  for (; stride == 1 && i + kOnce <= n; i += kOnce) __builtin_memcpy(to + i, from + i, 8);
  for (; i < n; ++i) to[i] = from[i * stride];
}

inline moelora::ScaleArgs in_one_row(moelora::ScaleArgs args, int64_t stride) {
  args.n *= args.rows;
  args.rows = 1;
  args.stride = stride;
  return args;
}

template <class U, class T, class Read>
[[gnu::always_inline]] inline bool read_scales(moelora::ScaleArgs args, const Read& read) {
  using V = typename U::V;
  typename U::Sizes sizes;
  // Rows behind one another are one, and so are those of one scale each.
  if (args.row_stride == args.n && args.stride == 1)
    args = in_one_row(args, 1);
  else if (args.n == 1)
    args = in_one_row(args, args.row_stride);
  const T* from = static_cast<const T*>(args.from);
  const bool side_by_side = args.stride == 1;
  if (side_by_side && (args.rows == 1 || args.n % V::lanes == 0)) {
    for (int64_t row = 0; row < args.rows; ++row, from += args.row_stride) {
      if (args.ahead != 0) fetch_scales(from + args.ahead, args.n);
      read_run<U>(from, args.n, args.to + row * args.n, sizes, read);
    }
  } else {
    // Rows too short for vectors are brought together first.
    T staged[kStagedScales + V::lanes];  // compilers see a rest behind a full one
    float* to = args.to;
    int64_t count = 0;
    for (int64_t row = 0; row < args.rows; ++row, from += args.row_stride) {
      if (args.ahead != 0) fetch_scales(from + args.ahead, side_by_side ? args.n : 1);
      for (int64_t i = 0, some; i < args.n; i += some) {
        some = args.n - i < kStagedScales - count ? args.n - i : kStagedScales - count;
        gather_scales(from + i * args.stride, args.stride, some, staged + count);
        count += some;
        if (count < kStagedScales) continue;
        read_run<U>(&staged[0], count, to, sizes, read);
        to += count;
        count = 0;
      }
    }
    read_run<U>(&staged[0], count, to, sizes, read);
  }
  if (sizes.ordinary()) return true;
  const int64_t all = args.rows * args.n;
  for (int64_t i = 0; i < all; i += V::lanes)
    V::store_n(args.to + i, U::canonical(V::load_n(args.to + i, all - i)), all - i);
  return false;
}

// Scales of V's own storage types.
template <class U, class T>
bool widen_scales(const moelora::ScaleArgs& given) {
  using V = typename U::V;
  const moelora::ScaleArgs args = given;
  return read_scales<U, T>(args,
                           [](const T* from, int64_t n) __attribute__((always_inline)) { return V::load_n(from, n); });
}

// Scales of a byte each.
template <class U, ScaleType S>
bool decode_scales(const moelora::ScaleArgs& given) {
  using V = typename U::V;
  const moelora::ScaleArgs args = given;
  return read_scales<U, uint8_t>(args, [&](const uint8_t* bytes, int64_t n) __attribute__((always_inline)) {
    if constexpr (S == ScaleType::indexed) {
      uint8_t few[V::lanes] = {};
      for (int64_t j = 0; n < V::lanes && j < n; ++j) few[j] = bytes[j];
      const typename V::vec picked = V::pick(args.values, n < V::lanes ? few : bytes);
      return V::add(V::mul(picked, V::set1(args.factor)), V::set1(args.offset));
    } else {
      const typename V::vec v = U::template bytes<S>(bytes, n);
      if constexpr (S == ScaleType::e4m3) return V::mul(v, V::set1(args.factor));
      return v;
    }
  });
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
