// Gated activations over a vector policy. Include inside an instruction set's unit only.
//
//   y = f(g) · (u + up_shift),  g clamped to at most limit, u to ±limit
//
// Values pass through small buffers; the arithmetic loops are plain and branch-free, so that the compiler vectorises
// them with the unit's own flags.
#pragma once

#include "ukernel/gather.inl"
#include "ukernel/ukernel.h"

namespace {

// An activation, taken apart so that nothing over- or underflows on the way to a result that does not:
//
//   f(g) = value · scale,  f'(g) = 2 · half_slope · scale²
//
// Where f vanishes, scale is the root of the e^-… that it vanishes with, else 1: its square may be far below what A
// holds, its product with u or dy not. |half_slope| < 1. At ±Inf f and f' are their limits; a NaN stays.
template <class A>
struct Activated {
  A value, scale, half_slope;
};

template <class A>
constexpr A largest() {
  return sizeof(A) == 4 ? static_cast<A>(__FLT_MAX__) : static_cast<A>(__DBL_MAX__);
}
template <class A>
inline A within(A x, A bound) {
  x = x > bound ? bound : x;
  return x < -bound ? -bound : x;
}

// e^-m, m >= 0, to about 1 ulp; 0 below the normal numbers. 2^n · p(r), -m = n·ln 2 + r in two parts, p of degree 6
// (Cephes' expf coefficients).
inline float exp_of_minus(float m) {
  const float shifted = 12582912.0f - m * 1.44269504f;  // 1.5 · 2^23: rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  const float r = n * 2.12194440e-4f - (m + n * 0.693359375f);
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t bits = moelora::bit_cast<uint32_t>(shifted) << 23;
  const float power = moelora::bit_cast<float>(moelora::bit_cast<uint32_t>(p) + bits);
  return m > 87.0f ? 0.0f : power;
}
inline double exp_of_minus(double m) { return m > 708.0 ? 0.0 : __builtin_exp(-m); }

// e^(x²/2) · Φ(-x), x >= 0: t · p(1 - 2·k·t), t = 1/(x + k), p interpolated at Chebyshev nodes; 1.1e-8 of the value.
inline float scaled_tail(float x) {
  const float t = 1.0f / (x + 3.5f), s = 1.0f - 7.0f * t;
  float p = -4.9766888e-05f;
  p = p * s + 3.46352026e-05f;
  p = p * s + 4.5269393e-04f;
  p = p * s - 4.17768606e-04f;
  p = p * s - 3.17898579e-03f;
  p = p * s + 6.46523386e-03f;
  p = p * s + 1.74060594e-02f;
  p = p * s - 1.16049044e-01f;
  p = p * s + 3.15425068e-01f;
  p = p * s - 5.65561891e-01f;
  p = p * s + 7.44416058e-01f;
  return p * t;
}
// The same; 4.7e-17.
inline double scaled_tail(double x) {
  constexpr double kFit[] = {
      -8.166192624428987e-10,  5.037302126379857e-10, 9.446827519677366e-09,  -5.015649939857857e-09,
      -6.782555313291156e-08,  3.581840051543223e-08, 4.340262594829775e-07,  -3.310698071526862e-07,
      -2.769337871043854e-06,  3.977912640593242e-06, 1.6681099115863468e-05, -4.976177118979218e-05,
      -5.9375673286488655e-05, 0.00054489883090093,   -0.0007978694094808063, -0.00299337673822322,
      0.020795066800941616,    -0.06911863870881432,  0.16502036617034282,    -0.3135331566712138,
      0.4953056159699768,      -0.6653825028900577,   0.769193049750063};
  const double t = 1.0 / (x + 5.0), s = 1.0 - 10.0 * t;
  double p = 0.0;
  for (const double c : kFit) p = p * s + c;
  return p * t;
}

// g · σ(2 · half), q = g times the derivative of 2 · half. `near` is g where g is finite and f has not vanished.
template <class A>
inline Activated<A> logistic(A g, A near, A half, A q) {
  const A h = exp_of_minus(half < 0 ? -half : half), e = h * h, r = A(1) / (A(1) + e);
  const bool tail = half < 0;
  return {(tail ? near * h : g) * r, tail ? h : A(1), A(0.5) * r * (A(1) + q * r * (tail ? A(1) : e))};
}

template <moelora::Activation Act, class A>
inline Activated<A> activate(A g, A half_alpha) {
  if constexpr (Act == moelora::Activation::silu) {
    const A near = within(g, largest<A>()), half = within(half_alpha * near, A(1000));
    return logistic(g, near, half, A(2) * half);
  } else if constexpr (Act == moelora::Activation::gelu) {
    const A near = within(g, A(64)), x = near < 0 ? -near : near;
    const A h = exp_of_minus(A(0.25) * x * x), e = h * h, t = scaled_tail(x);
    const A q = x * A(0.39894228040143267794) - t;
    const bool tail = g < 0;
    return {tail ? near * h * t : g * (A(1) - e * t), tail ? h : A(1), A(0.5) * (tail ? -q : A(1) + e * q)};
  } else {
    // 2·sqrt(2/π): (1 + tanh z)/2 = σ(2z)
    const A near = within(g, A(32)), k = A(1.59576912160573071176) * near, c = A(0.044715) * near * near;
    return logistic(g, near, A(0.5) * k * (A(1) + c), k * (A(1) + A(3) * c));
  }
}

// Of finite arguments: what is beyond A's range is its end.
template <class A>
inline A narrowed(double x) {
  return static_cast<A>(__builtin_isinf(x) ? x : within(x, static_cast<double>(largest<A>())));
}

constexpr int kGluBlock = 64;

// A block behind `p` will be read soon. Past a row's end is the next row.
constexpr int64_t kGluAhead = 6 * kGluBlock;
template <class T>
inline void fetch_ahead(const T* p, int64_t stride) {
  for (int64_t i = 0; i < kGluBlock; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(p + (kGluAhead + i) * stride);
}

// g, u: [count] from h: [2 · width]
template <class V, class T>
inline void load_gate_up(typename V::acc_t* g, typename V::acc_t* u, const T* h, int64_t stride, int64_t width,
                         int64_t first, int64_t count, bool interleaved) {
  using acc_t = typename V::acc_t;
  T raw[V::lanes];
  const int64_t gate_at = interleaved ? 2 * first : first, up_at = interleaved ? gate_at + kGluBlock : width + first;
  fetch_ahead(h + gate_at * stride, stride);
  fetch_ahead(h + up_at * stride, stride);
  if (!interleaved) {
    for (int64_t i = 0; i < count; i += V::lanes) {
      const int64_t n = count - i < V::lanes ? count - i : V::lanes;
      V::store(g + i, V::load_n(gathered(raw, h + (first + i) * stride, stride, n), n));
      V::store(u + i, V::load_n(gathered(raw, h + (width + first + i) * stride, stride, n), n));
    }
    return;
  }
  acc_t both[2 * kGluBlock];
  for (int64_t i = 0; i < 2 * count; i += V::lanes) {
    const int64_t n = 2 * count - i < V::lanes ? 2 * count - i : V::lanes;
    V::store(both + i, V::load_n(gathered(raw, h + (2 * first + i) * stride, stride, n), n));
  }
  for (int i = 0; i < kGluBlock; ++i) {
    g[i] = both[2 * i];
    u[i] = both[2 * i + 1];
  }
}

// Loops of their own: in one with the activation, the compiler would evaluate that once for each outcome.
template <class A>
inline void clamp(A* g, A* u, A limit) {
  for (int i = 0; i < kGluBlock; ++i) g[i] = g[i] > limit ? limit : g[i];
  for (int i = 0; i < kGluBlock; ++i) {
    const A at_most = u[i] > limit ? limit : u[i];
    u[i] = at_most < -limit ? -limit : at_most;
  }
}

template <class V, class T, moelora::Activation Act>
void glu_row(void* y, const void* h, int64_t h_stride, int64_t width, const moelora::GluArgs& args) {
  using A = typename V::acc_t;
  const A half_alpha = narrowed<A>(args.alpha / 2), limit = narrowed<A>(args.limit);
  const A shift = narrowed<A>(args.up_shift);
  A g[kGluBlock] = {}, u[kGluBlock] = {}, out[kGluBlock];
  for (int64_t first = 0; first < width; first += kGluBlock) {
    const int64_t count = width - first < kGluBlock ? width - first : kGluBlock;
    load_gate_up<V, T>(g, u, static_cast<const T*>(h), h_stride, width, first, count, args.interleaved);
    clamp(g, u, limit);
    for (int i = 0; i < kGluBlock; ++i) {
      const Activated<A> f = activate<Act>(g[i], half_alpha);
      out[i] = f.value * (f.scale * (u[i] + shift));
    }
    T* dst = static_cast<T*>(y) + first;
    for (int64_t i = 0; i < count; i += V::lanes)
      V::store_n(dst + i, V::load(out + i), count - i < V::lanes ? count - i : V::lanes);
  }
}

template <class V, class T, moelora::Activation Act>
void glu_backward_row(void* dh, const void* dy, int64_t dy_stride, const void* h, int64_t h_stride, int64_t width,
                      const moelora::GluArgs& args) {
  using A = typename V::acc_t;
  const A half_alpha = narrowed<A>(args.alpha / 2), limit = narrowed<A>(args.limit);
  const A shift = narrowed<A>(args.up_shift);
  A g[kGluBlock] = {}, u[kGluBlock] = {}, d[kGluBlock] = {}, gate[kGluBlock], up[kGluBlock], both[2 * kGluBlock];
  T raw[V::lanes];
  for (int64_t first = 0; first < width; first += kGluBlock) {
    const int64_t count = width - first < kGluBlock ? width - first : kGluBlock;
    load_gate_up<V, T>(g, u, static_cast<const T*>(h), h_stride, width, first, count, args.interleaved);
    for (int64_t i = 0; i < count; i += V::lanes) {
      const int64_t n = count - i < V::lanes ? count - i : V::lanes;
      const T* src = static_cast<const T*>(dy) + (first + i) * dy_stride;
      V::store(d + i, V::load_n(gathered(raw, src, dy_stride, n), n));
    }
    const int64_t gate_step = args.interleaved ? 2 : 1, up_at = args.interleaved ? 1 : kGluBlock;
    for (int i = 0; i < kGluBlock; ++i) gate[i] = g[i], up[i] = u[i];
    clamp(gate, up, limit);
    for (int i = 0; i < kGluBlock; ++i) {
      const Activated<A> f = activate<Act>(gate[i], half_alpha);
      const A scaled = d[i] * f.scale;
      gate[i] = A(2) * (scaled * f.half_slope * ((up[i] + shift) * f.scale));
      up[i] = scaled * f.value;
    }
    for (int i = 0; i < kGluBlock; ++i) {
      both[i * gate_step] = g[i] > limit ? A(0) : gate[i];
      both[i * gate_step + up_at] = u[i] > limit || u[i] < -limit ? A(0) : up[i];
    }
    T* dst = static_cast<T*>(dh);
    for (int64_t i = 0; i < (args.interleaved ? 2 * count : count); i += V::lanes) {
      const int64_t left = (args.interleaved ? 2 * count : count) - i;
      const int64_t n = left < V::lanes ? left : V::lanes;
      V::store_n(dst + (args.interleaved ? 2 * first : first) + i, V::load(both + i), n);
      if (!args.interleaved) V::store_n(dst + width + first + i, V::load(both + kGluBlock + i), n);
    }
  }
}

template <class V, class T>
void glu_any(void* y, const void* h, int64_t h_stride, int64_t width, const moelora::GluArgs& args) {
  using moelora::Activation;
  if (args.act == Activation::silu) return glu_row<V, T, Activation::silu>(y, h, h_stride, width, args);
  if (args.act == Activation::gelu) return glu_row<V, T, Activation::gelu>(y, h, h_stride, width, args);
  glu_row<V, T, Activation::gelu_tanh>(y, h, h_stride, width, args);
}

template <class V, class T>
void glu_backward_any(void* dh, const void* dy, int64_t dy_stride, const void* h, int64_t h_stride, int64_t width,
                      const moelora::GluArgs& args) {
  using moelora::Activation;
  const auto row = args.act == Activation::silu   ? glu_backward_row<V, T, Activation::silu>
                   : args.act == Activation::gelu ? glu_backward_row<V, T, Activation::gelu>
                                                  : glu_backward_row<V, T, Activation::gelu_tanh>;
  row(dh, dy, dy_stride, h, h_stride, width, args);
}

template <class V, class T>
void fill_glu(moelora::Kernels& k, moelora::DType storage) {
  k.glu[static_cast<int>(storage)] = glu_any<V, T>;
  k.glu_backward[static_cast<int>(storage)] = glu_backward_any<V, T>;
}

}  // namespace
