#include "bindings/rates.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dispatch/table.h"

namespace py = pybind11;

namespace moelora {
namespace {

using Clock = std::chrono::steady_clock;

double elapsed(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

// Calls body() on every thread for about `seconds`; sums what the calls return and divides by the time.
template <class F>
double rate(int threads, double seconds, const F& make_body) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  std::vector<double> rates(static_cast<size_t>(threads));
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      auto body = make_body(t);
      body();
      double work = 0;
      const auto start = Clock::now();
      while (elapsed(start) < seconds) work += body();
      rates[static_cast<size_t>(t)] = work / elapsed(start);
    });
  for (std::thread& t : team) t.join();
  double total = 0;
  for (double r : rates) total += r;
  return total;
}

DType dtype_named(const std::string& name) {
  for (DType t : {DType::bf16, DType::f16, DType::f32, DType::f64})
    if (name == name_of(t)) return t;
  throw std::invalid_argument("dtype must be bf16, fp16, fp32 or fp64, got " + name);
}

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};

// Normally distributed values, as activations and weights are: processors clock higher on zeros.
std::shared_ptr<char> operand(const Kernels& k, int64_t count) {
  const int64_t size = size_of(k.compute);
  char* p = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((count * size + 63) / 64 * 64)));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) {
    const float value = normal(random);
    const double wide = value;
    const bf16_t narrow = to_bf16(value);
    const void* from = size == 8   ? static_cast<const void*>(&wide)
                       : size == 4 ? static_cast<const void*>(&value)
                                   : &narrow;
    std::memcpy(p + i * size, from, static_cast<size_t>(size));
  }
  return {p, AlignedFree{}};
}

// What the arithmetic units of the chosen instruction set can do.
double measure_peak_rate(const std::string& dtype, int threads, double seconds) {
  const Kernels& k = *kernels_for(dtype_named(dtype)).kernels;
  return rate(threads, seconds, [&](int) {
    auto values = operand(k, kPeakValues), c = operand(k, kPeakValues);
    return [=, &k] { return k.peak(c.get(), values.get(), 500); };
  });
}

// Tiles whose operands stay in the first-level cache.
double measure_dot_rate(const std::string& dtype, int threads, double seconds) {
  const KernelChoice& choice = kernels_for(dtype_named(dtype));
  const Kernels& k = *choice.kernels;
  constexpr int64_t kDepth = 128;
  return rate(threads, seconds, [&](int) {
    const int rows = k.max_rows[k.vecs - 1];
    const int64_t lanes = k.lanes * k.vecs, size = size_of(k.compute);
    auto l = operand(k, rows * kDepth), r = operand(k, lanes * kDepth);
    auto c = operand(k, rows * lanes * 2);
    return [=, &k] {
      const TileArgs args{{{l.get(), kDepth * size, r.get(), kDepth}, {}},
                          1,
                          rows,
                          k.vecs,
                          false,
                          lanes,
                          c.get(),
                          lanes,
                          Start::zero,
                          {}};
      for (int i = 0; i < 1000; ++i) k.tile(args);
      return 2000.0 * rows * static_cast<double>(lanes) * kDepth;
    };
  });
}

// Every thread sums its own part of a buffer larger than any cache.
double measure_read_bandwidth(int64_t bytes, int threads, double seconds) {
  const int64_t words = bytes / 8 / std::max(threads, 1);
  if (words < 1024) throw std::invalid_argument("bytes must be at least 8192 a thread, got " + std::to_string(bytes));
  return rate(threads, seconds, [&](int) {
    auto buffer = std::make_shared<std::vector<uint64_t>>(static_cast<size_t>(words), 1);
    return [=] {
      uint64_t sums[16] = {};
      const uint64_t* p = buffer->data();
      for (int64_t i = 0; i + 16 <= words; i += 16)
        for (int64_t j = 0; j < 16; ++j) sums[j] += p[i + j];
      volatile uint64_t keep = 0;
      for (uint64_t s : sums) keep = keep + s;
      return 8.0 * static_cast<double>(words);
    };
  });
}

}  // namespace

void bind_rates(py::module_& m) {
  m.def("measure_peak_rate", &measure_peak_rate, py::arg("dtype"), py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "FLOP/s of multiply-adds on registers, with the instruction set that dtype (bf16, fp16, fp32, fp64) gets.");
  m.def("measure_dot_rate", &measure_dot_rate, py::arg("dtype"), py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "FLOP/s of the chosen kernels' widest tile for dtype, on operands in the first-level cache.");
  m.def("measure_read_bandwidth", &measure_read_bandwidth, py::arg("bytes"), py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(), "B/s of reading `bytes`, split over the threads.");
}

}  // namespace moelora
