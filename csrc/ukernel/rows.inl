// Row operations on accumulators over a vector policy. Include inside an instruction set's unit only.
//
// V: acc_t, vec, lanes; load/store and load_n/store_n of every storage type, zero, set1, add, mul, fma, sum, transpose
#pragma once

#include "ukernel/gather.inl"
#include "ukernel/ukernel.h"

namespace {

// dst: [cols, rows] = srcᵀ, src: [rows, cols]
template <class V>
void transpose_rows(void* dst, int64_t ldd, const void* src, int64_t lds, int64_t rows, int64_t cols) {
  using acc_t = typename V::acc_t;
  constexpr int kLanes = V::lanes;
  acc_t* d = static_cast<acc_t*>(dst);
  const acc_t* s = static_cast<const acc_t*>(src);
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int64_t in_rows = rows - i < kLanes ? rows - i : kLanes;
      const int64_t in_cols = cols - j < kLanes ? cols - j : kLanes;
      typename V::vec v[kLanes];
      for (int q = 0; q < kLanes; ++q) v[q] = q < in_rows ? V::load_n(s + (i + q) * lds + j, in_cols) : V::zero();
      V::transpose(v);
      for (int64_t q = 0; q < in_cols; ++q) V::store_n(d + (j + q) * ldd + i, v[q], in_rows);
    }
}

template <class V, class T>
void store_row(void* dst, const void* c, const void* bias, double scale, int64_t n) {
  using acc_t = typename V::acc_t;
  T* d = static_cast<T*>(dst);
  const acc_t* s = static_cast<const acc_t*>(c);
  const acc_t* b = static_cast<const acc_t*>(bias);
  const typename V::vec factor = V::set1(static_cast<acc_t>(scale));
  for (int64_t i = 0; i < n; i += V::lanes) {
    const int64_t count = n - i < V::lanes ? n - i : V::lanes;
    typename V::vec v = V::load_n(s + i, count);
    if (b) v = V::add(v, V::load_n(b + i, count));
    V::store_n(d + i, V::mul(v, factor), count);
  }
}

template <class V>
void add_row_acc(void* acc, const void* c, const void* bias, double scale, int64_t n) {
  using acc_t = typename V::acc_t;
  acc_t* d = static_cast<acc_t*>(acc);
  const acc_t* s = static_cast<const acc_t*>(c);
  const acc_t* b = static_cast<const acc_t*>(bias);
  const typename V::vec factor = V::set1(static_cast<acc_t>(scale));
  for (int64_t i = 0; i < n; i += V::lanes) {
    const int64_t count = n - i < V::lanes ? n - i : V::lanes;
    typename V::vec v = V::load_n(s + i, count);
    if (b) v = V::add(v, V::load_n(b + i, count));
    V::store_n(d + i, V::fma(v, factor, V::load_n(d + i, count)), count);
  }
}

template <class V, class T>
void add_row(void* acc, const void* src, int64_t stride, double scale, int64_t n) {
  using acc_t = typename V::acc_t;
  acc_t* d = static_cast<acc_t*>(acc);
  const T* s = static_cast<const T*>(src);
  const typename V::vec factor = V::set1(static_cast<acc_t>(scale));
  T buffer[V::lanes];
  for (int64_t i = 0; i < n; i += V::lanes) {
    const int64_t count = n - i < V::lanes ? n - i : V::lanes;
    const typename V::vec v = V::load_n(gathered(buffer, s + i * stride, stride, count), count);
    V::store_n(d + i, V::fma(v, factor, V::load_n(d + i, count)), count);
  }
}

template <class V, class T>
double dot_row(const void* c, const void* x, int64_t stride, int64_t n) {
  using acc_t = typename V::acc_t;
  const acc_t* a = static_cast<const acc_t*>(c);
  const T* b = static_cast<const T*>(x);
  typename V::vec total = V::zero();
  T buffer[V::lanes];
  for (int64_t i = 0; i < n; i += V::lanes) {
    const int64_t count = n - i < V::lanes ? n - i : V::lanes;
    const T* b_at = gathered(buffer, b + i * stride, stride, count);
    total = V::fma(V::load_n(a + i, count), V::load_n(b_at, count), total);
  }
  return V::sum(total);
}

template <class V>
void fill_rows(moelora::Kernels& k) {
  k.transpose = transpose_rows<V>;
  k.add = add_row_acc<V>;
}

template <class V, class T>
void fill_rows_of(moelora::Kernels& k, moelora::DType storage) {
  const int t = static_cast<int>(storage);
  k.store[t] = store_row<V, T>;
  k.add_row[t] = add_row<V, T>;
  k.dot[t] = dot_row<V, T>;
}

}  // namespace
