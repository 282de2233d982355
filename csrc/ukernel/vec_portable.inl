// Vectors of any CPU: the compiler's own 16-byte vector type, lowered to whatever the target has.
#pragma once

#include "ukernel/ukernel.h"

namespace {

using moelora::bf16_t;
using moelora::f16_t;

template <class A, int Lanes>
struct PortableVec {
  using acc_t = A;
  typedef A vec __attribute__((vector_size(Lanes * sizeof(A))));
  static constexpr int lanes = Lanes;
  static constexpr bool widens = false;
  static constexpr int sums = 8;

  static vec zero() { return vec{}; }
  static vec set1(A v) { return vec{} + v; }
  static vec add(vec a, vec b) { return a + b; }
  static vec mul(vec a, vec b) { return a * b; }
  static vec fma(vec a, vec b, vec c) { return a * b + c; }
  static A sum(vec a) {
    A total = 0;
    for (int i = 0; i < Lanes; ++i) total += a[i];
    return total;
  }

  static A widen(A v) { return v; }
  static A widen(bf16_t v) { return moelora::to_float(v); }
  static A widen(f16_t v) { return moelora::to_float(v); }
  static void narrow(A* p, A v) { *p = v; }
  static void narrow(bf16_t* p, A v) { *p = moelora::to_bf16(static_cast<float>(v)); }
  static void narrow(f16_t* p, A v) { *p = moelora::to_f16(static_cast<float>(v)); }

  static vec load(const A* p) {
    vec v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  template <class T>
  static vec load_n(const T* p, int64_t n) {
    vec v{};
    for (int i = 0; i < Lanes; ++i)
      if (i < n) v[i] = widen(p[i]);
    return v;
  }
  static vec pick(const A* v, const uint8_t* at) {
    vec picked;
    for (int i = 0; i < Lanes; ++i) picked[i] = v[at[i]];
    return picked;
  }
  static void store(A* p, vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
  template <class T>
  static void store_n(T* p, vec v, int64_t n) {
    for (int i = 0; i < Lanes; ++i)
      if (i < n) narrow(p + i, v[i]);
  }
  static void transpose(vec (&v)[Lanes]) {
    for (int i = 0; i < Lanes; ++i)
      for (int j = 0; j < i; ++j) {
        const A upper = v[j][i];
        v[j][i] = v[i][j];
        v[i][j] = upper;
      }
  }
};

}  // namespace
