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

// e^x for fp32 to about 1 ulp: 2^n · p(r), r = x - n·ln 2 in two parts, p of degree 6 (Cephes' expf coefficients).
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t bits = moelora::bit_cast<uint32_t>(shifted) << 23;
  return moelora::bit_cast<float>(moelora::bit_cast<uint32_t>(p) + bits);
}
inline double exp_of(double x) { return __builtin_exp(x); }

template <class A>
inline A sigmoid(A x) {
  return A(1) / (A(1) + exp_of(-x));
}

// Φ(x), the normal distribution function. fp32: erfc by the Chebyshev fit of Numerical Recipes (erfcc), 1.2e-7.
inline float normal_cdf(float x) {
  const float z = (x < 0 ? -x : x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float tail = 0.5f * t * exp_of(p - z * z);
  return x < 0 ? tail : 1.0f - tail;
}
inline double normal_cdf(double x) { return 0.5 * __builtin_erfc(-x * 0.70710678118654752440); }

template <class A>
struct Activated {
  A value, slope;
};

template <moelora::Activation Act, class A>
inline Activated<A> activate(A g, A alpha) {
  if constexpr (Act == moelora::Activation::silu) {
    const A s = sigmoid(alpha * g);
    return {g * s, s + alpha * g * s * (A(1) - s)};
  } else if constexpr (Act == moelora::Activation::gelu) {
    const A phi = normal_cdf(g);
    return {g * phi, phi + g * A(0.39894228040143267794) * exp_of(A(-0.5) * g * g)};
  } else {
    const A k = A(1.59576912160573071176), c = A(0.044715);  // 2·sqrt(2/π): x·(1 + tanh z)/2 = x·σ(2z)
    const A s = sigmoid(k * (g + c * g * g * g));
    return {g * s, s + g * s * (A(1) - s) * k * (A(1) + A(3) * c * g * g)};
  }
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
  const A alpha = static_cast<A>(args.alpha), limit = static_cast<A>(args.limit);
  const A shift = static_cast<A>(args.up_shift);
  A g[kGluBlock] = {}, u[kGluBlock] = {}, out[kGluBlock];
  for (int64_t first = 0; first < width; first += kGluBlock) {
    const int64_t count = width - first < kGluBlock ? width - first : kGluBlock;
    load_gate_up<V, T>(g, u, static_cast<const T*>(h), h_stride, width, first, count, args.interleaved);
    clamp(g, u, limit);
    for (int i = 0; i < kGluBlock; ++i) out[i] = activate<Act>(g[i], alpha).value * (u[i] + shift);
    T* dst = static_cast<T*>(y) + first;
    for (int64_t i = 0; i < count; i += V::lanes)
      V::store_n(dst + i, V::load(out + i), count - i < V::lanes ? count - i : V::lanes);
  }
}

template <class V, class T, moelora::Activation Act>
void glu_backward_row(void* dh, const void* dy, int64_t dy_stride, const void* h, int64_t h_stride, int64_t width,
                      const moelora::GluArgs& args) {
  using A = typename V::acc_t;
  const A alpha = static_cast<A>(args.alpha), limit = static_cast<A>(args.limit);
  const A shift = static_cast<A>(args.up_shift);
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
      const Activated<A> f = activate<Act>(gate[i], alpha);
      gate[i] = d[i] * (up[i] + shift) * f.slope;
      up[i] = d[i] * f.value;
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
