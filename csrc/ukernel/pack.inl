// Packing and conversion over a vector policy. Include inside an instruction set's unit only.
//
// P: elem (compute type), acc_t, lanes, pack, unit (a vector of `lanes` units, a unit being `pack` elements)
//    load_units(const T*, n)          lanes · pack consecutive elements, those from n on are zero
//    interleave(const T*, const T*, n) lane j: the unit (a[j], b[j]) (pack 2; b may be null) or a[j] (pack 1)
//    transpose(unit (&)[lanes]), store_units(elem*, unit), store_half(elem*, unit): its first half
//    interleave_two(const T*, const T*, unit*, unit*): two vectors of whole rows, where P offers it
#pragma once

#include "ukernel/gather.inl"
#include "ukernel/ukernel.h"

namespace {

constexpr int64_t kLanesAhead = 4;  // vectors of every row

// panel: [ceil(n / pack)][panel_lanes][pack] from rows [n_rows][n]
template <class P, class T>
void pack_lanes(const moelora::PackArgs& args) {
  constexpr int kLanes = P::lanes, kUnit = P::lanes * P::pack;
  auto* panel = static_cast<typename P::elem*>(args.panel);
  const int64_t line = args.panel_lanes * P::pack;
  T buffer[kUnit];
  for (int64_t lane = 0; lane < args.panel_lanes; lane += kLanes) {
    for (int64_t p = 0; p < args.n; p += kUnit) {
      const int64_t left = args.n - p;
      const int64_t count = left < kUnit ? left : kUnit;
      typename P::unit v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        if (lane + i < args.n_rows) {
          const T* row = static_cast<const T*>(args.rows[lane + i]) + (args.first + p) * args.stride;
          __builtin_prefetch(row + kLanesAhead * kUnit * args.stride);
          v[i] = P::load_units(gathered(buffer, row, args.stride, count), count);
        } else {
          v[i] = P::zero_units();
        }
      }
      P::transpose(v);
      const int64_t lines = (count + P::pack - 1) / P::pack;
      typename P::elem* dst = panel + (p / P::pack) * line + lane * P::pack;
      if (lane + kLanes <= args.panel_lanes)
        for (int64_t i = 0; i < lines; ++i) P::store_units(dst + i * line, v[i]);
      else
        for (int64_t i = 0; i < lines; ++i) P::store_half(dst + i * line, v[i]);
    }
  }
}

constexpr int64_t kFetchAhead = 2048;  // bytes of rows that are wanted soon; more would evict each other from L1
constexpr int64_t kFetchBytes = 512;   // longer rows are streams that the processor follows by itself

// One line of a panel: lane j is (a[j], b[j]), j < n, zero up to panel_lanes. b: of an even p's row the next one, if
// any.
template <class P, class T>
[[gnu::always_inline]] inline void pack_line(typename P::elem* line, const T* a, const T* b, int64_t stride, int64_t n,
                                             int64_t panel_lanes) {
  constexpr int kLanes = P::lanes;
  T buffer_a[kLanes], buffer_b[kLanes];
  int64_t lane = 0;
  if constexpr (requires(typename P::unit u) { P::interleave_two(a, a, &u, &u); })
    if (b && stride == 1)
      for (; lane + 2 * kLanes <= n; lane += 2 * kLanes) {
        typename P::unit low, high;
        P::interleave_two(a + lane, b + lane, &low, &high);
        P::store_units(line + lane * P::pack, low);
        P::store_units(line + (lane + kLanes) * P::pack, high);
      }
  for (; lane < panel_lanes; lane += kLanes) {
    const int64_t left = n - lane;
    const int64_t count = left < kLanes ? left : kLanes;
    typename P::unit v = P::zero_units();
    if (left > 0) {
      const T* a_at = gathered(buffer_a, a + lane * stride, stride, count);
      const T* b_at = b ? gathered(buffer_b, b + lane * stride, stride, count) : nullptr;
      v = P::interleave(a_at, b_at, count);
    }
    if (lane + kLanes <= panel_lanes)
      P::store_units(line + lane * P::pack, v);
    else
      P::store_half(line + lane * P::pack, v);
  }
}

// panels: [n / panel_lanes][ceil(n_rows / pack)][panel_lanes][pack] from rows [n_rows][n]
template <class P, class T>
void pack_depth(const moelora::PackArgs& args) {
  auto* panel = static_cast<char*>(args.panel);
  const int64_t line = args.panel_lanes * P::pack * static_cast<int64_t>(sizeof(typename P::elem));
  const int64_t row_bytes = args.n * static_cast<int64_t>(sizeof(T));
  const int64_t run = args.stride == 1 && row_bytes <= kFetchBytes ? row_bytes : 0;
  const int64_t rows_ahead = run > 0 ? kFetchAhead / run / P::pack * P::pack : 0;
  for (int64_t p = 0; p < args.n_rows; p += P::pack, panel += line) {
    // Rows may be anywhere, and a panel takes too little of each for the processor to see it coming.
    for (int64_t q = p + rows_ahead; run > 0 && q < p + rows_ahead + P::pack && q < args.n_rows; ++q)
      for (int64_t at = 0; at < run; at += 64)
        __builtin_prefetch(static_cast<const char*>(args.rows[q]) + args.first * static_cast<int64_t>(sizeof(T)) + at);
    const T* a = static_cast<const T*>(args.rows[p]) + args.first * args.stride;
    const T* b = nullptr;
    if (P::pack == 2 && p + 1 < args.n_rows) b = static_cast<const T*>(args.rows[p + 1]) + args.first * args.stride;
    char* to = panel;
    int64_t lane = 0;
    // Whole vectors of whole panels.
    if (P::pack == 1 && args.stride == 1 && args.panel_lanes % P::lanes == 0)
      for (; lane + args.panel_lanes <= args.n; lane += args.panel_lanes, to += args.panels_apart)
        for (int64_t v = 0; v < args.panel_lanes; v += P::lanes)
          P::store_units(reinterpret_cast<typename P::elem*>(to) + v, P::interleave(a + lane + v, a, P::lanes));
    for (; lane < args.n; lane += args.panel_lanes, to += args.panels_apart) {
      const int64_t left = args.n - lane, n = left < args.panel_lanes ? left : args.panel_lanes;
      pack_line<P>(reinterpret_cast<typename P::elem*>(to), a + lane * args.stride,
                   b ? b + lane * args.stride : nullptr, args.stride, n, args.panel_lanes);
    }
  }
}

template <class V, class P, class T>
void convert(void* dst, const void* src, int64_t n, int64_t stride) {
  auto* d = static_cast<typename P::elem*>(dst);
  const T* s = static_cast<const T*>(src);
  T buffer[V::lanes];
  int64_t i = 0;
  if (stride == 1)
    for (; i + V::lanes <= n; i += V::lanes) V::store_n(d + i, V::load_n(s + i, V::lanes), V::lanes);
  for (; i < n; i += V::lanes) {
    const int64_t count = n - i < V::lanes ? n - i : V::lanes;
    V::store_n(d + i, V::load_n(gathered(buffer, s + i * stride, stride, count), count), count);
  }
}

// dst: [n][n_rows], from rows [n_rows][n]
template <class V, class P, class T>
void transpose_in(void* dst, int64_t ldd, const moelora::PackArgs& args, const void* scale) {
  constexpr int kLanes = V::lanes;
  auto* d = static_cast<typename P::elem*>(dst);
  const auto* factor = static_cast<const typename V::acc_t*>(scale);
  T buffer[kLanes];
  for (int64_t j = 0; j < args.n_rows; j += kLanes) {
    const int64_t lanes_here = args.n_rows - j < kLanes ? args.n_rows - j : kLanes;
    for (int64_t i = 0; i < args.n; i += kLanes) {
      const int64_t count = args.n - i < kLanes ? args.n - i : kLanes;
      typename V::vec v[kLanes];
      for (int q = 0; q < kLanes; ++q) {
        if (q < lanes_here) {
          const T* row = static_cast<const T*>(args.rows[j + q]) + (args.first + i) * args.stride;
          v[q] = V::load_n(gathered(buffer, row, args.stride, count), count);
          if (factor) v[q] = V::mul(v[q], V::set1(factor[j + q]));
        } else {
          v[q] = V::zero();
        }
      }
      V::transpose(v);
      for (int64_t q = 0; q < count; ++q) V::store_n(d + (i + q) * ldd + j, v[q], lanes_here);
    }
  }
}

template <class V, class P, class T>
void fill_packs(moelora::Kernels& k, moelora::DType storage) {
  const int t = static_cast<int>(storage);
  k.pack_lanes[t] = pack_lanes<P, T>;
  k.pack_depth[t] = pack_depth<P, T>;
  k.convert[t] = convert<V, P, T>;
  k.transpose_in[t] = transpose_in<V, P, T>;
}

}  // namespace
