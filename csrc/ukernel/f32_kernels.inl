// A whole set of fp32 kernels from a vector policy.
#pragma once

#include "ukernel/dot.inl"
#include "ukernel/flat.inl"
#include "ukernel/glu.inl"
#include "ukernel/pack.inl"
#include "ukernel/rows.inl"
#include "ukernel/tile.inl"

namespace {

struct NoHalf {
  using vec = char;
  using opvec = char;
};
template <class H, moelora::DType Compute>
struct HalfOf;

// The tile's and the packs' operations where operands are accumulators' type. H: the policy of half as many lanes, if
// any.
template <class V, moelora::DType Compute, class H = void>
struct Plain : V {
  using Half = typename HalfOf<H, Compute>::type;
  static constexpr bool has_half = !__is_same(H, void);
  static constexpr bool weaves = false;
  static constexpr bool widens = V::widens;
  using acc_t = typename V::acc_t;
  using elem = acc_t;
  using opvec = typename V::vec;
  using unit = typename V::vec;
  static constexpr int pack = 1;
  static constexpr moelora::DType compute = Compute;

  static opvec broadcast(const elem* p) { return V::set1(*p); }
  static opvec broadcast_last(const elem* p) { return V::set1(*p); }
  static opvec load_panel(const elem* p) { return V::load(p); }
  template <class T>
  static opvec load_whole(const T* p) {
    return V::load_n(p, V::lanes);
  }
  template <class T>
  static opvec load_run(const T* p, int64_t n) {
    return V::load_n(p, n);
  }
  static void stage(elem* dst, const elem* src, int64_t n) {
    for (int64_t i = 0; i < n; i += V::lanes) V::store(dst + i, V::load_n(src + i, n - i));
  }

  template <class T>
  static unit load_units(const T* p, int64_t n) {
    return V::load_n(p, n);
  }
  template <class T>
  static unit interleave(const T* a, const T*, int64_t n) {
    return V::load_n(a, n);
  }
  static unit zero_units() { return V::zero(); }
  static void store_units(elem* p, unit v) { V::store(p, v); }
  static void store_half(elem* p, unit v) { V::store_n(p, v, V::lanes / 2); }
};

template <class H, moelora::DType Compute>
struct HalfOf {
  using type = Plain<H, Compute>;
};
template <moelora::DType Compute>
struct HalfOf<void, Compute> {
  using type = NoHalf;
};

template <class V, class Op, class T>
void fill_storage(moelora::Kernels& k, moelora::DType storage) {
  fill_packs<V, Op, T>(k, storage);
  fill_rows_of<V, T>(k, storage);
  fill_glu<V, T>(k, storage);
  if constexpr (Op::pack == 1)
    k.flat_tile[static_cast<int>(storage)] = flat_any<Op, Rows<Op, T, 1>>;
  else if constexpr (Op::weaves)
    k.flat_tile[static_cast<int>(storage)] = flat_any<Op, RowPairs<Op, T>>;
  if constexpr (requires(const T* row) { V::sum_of_four, Op::load_whole(row); }) fill_dot<Op, T>(k, storage);
}

template <class V, class H, int... TallestTiles>
moelora::Kernels f32_kernels(const char* name) {
  using Op = Plain<V, moelora::DType::f32, H>;
  moelora::Kernels k{};
  k.name = name;
  fill_tiles<Op, TallestTiles...>(k);
  fill_rows<V>(k);
  fill_storage<V, Op, moelora::bf16_t>(k, moelora::DType::bf16);
  fill_storage<V, Op, moelora::f16_t>(k, moelora::DType::f16);
  fill_storage<V, Op, float>(k, moelora::DType::f32);
  k.flat_lines = k.flat_tile[static_cast<int>(moelora::DType::f32)];
  return k;
}

}  // namespace
