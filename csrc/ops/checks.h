// Argument checks of the CPU operators: the wording and the order of torch_moelora/checks.py. They raise before any
// work.
#pragma once

#include <string>

#include "formats/formats.h"
#include "ops/tensors.h"

namespace moelora::ops {

std::string dtype_text(ScalarType t);
std::string dtype_text(const Tensor& t);
std::string shape_text(const Tensor& t);
std::string number_text(double value);

// The tensors' contiguous copies where needed, and the views of them.
struct CheckedRouting {
  Tensor sorted_scattered_idxs, expert_offsets;
  Routing routing;
};

// `weight` and what says how it is to be read.
struct WeightArgs {
  const Tensor& weight;
  const OptionalTensor &scale, &scale2, &zero;
  const std::string& format;
  bool transposed;
};

// Checks of one operator, in schema order. `op` heads every message.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  CheckedRouting routing(const Tensor& sorted_scattered_idxs, const Tensor& expert_offsets, int64_t top_k) const;
  void x(const Tensor& x, const Routing& r, bool x_grouped) const;
  void dy(const Tensor& dy, const Routing& r, bool gated) const;
  void floating(const char* name, const Tensor& t) const;
  void integer(const char* name, const Tensor& t) const;  // int32 or int64
  void like(const char* name, const Tensor& t, const char* lead_name, const Tensor& lead, bool or_fp32 = false) const;
  // The weight and all that belongs to it.
  Weights weight(const WeightArgs& w, const char* lead_name, const Tensor& lead, const Routing& r) const;
  void columns(const char* name, const Tensor& t, const char* letter, int64_t size, const char* owner) const;
  // sizes of [E, N, K]
  void lora(const OptionalTensor& a, const OptionalTensor& b, const char* lead_name, const Tensor& lead, int64_t e,
            int64_t n, int64_t k) const;
  void finite(const char* name, double value) const;
  void bias(const OptionalTensor& bias, const char* lead_name, const Tensor& lead, int64_t e, int64_t n) const;
  void gates(const OptionalTensor& gates, const char* lead_name, const Tensor& lead, const Routing& r,
             bool y_grouped) const;
  // Reads the index tensors; fills r.stable.
  void contents(Routing& r) const;

  // Raises "<op>: <message>" unless `condition`.
  template <class Message>
  void require(bool condition, const Message& message) const {
    if (!condition) fail(message());
  }

 private:
  void experts(const Tensor& w, const Routing& r) const;
  Packed codes(const FormatRow& row, const WeightArgs& w, const char* lead_name, const Tensor& lead,
               const Routing& r) const;
  void scales(const FormatRow& row, const WeightArgs& w, Packed& packed) const;
  void second_scales(const FormatRow& row, const WeightArgs& w, Packed& packed) const;
  void zeros(const FormatRow& row, const WeightArgs& w, Packed& packed) const;
  int64_t group_size(const FormatRow& row, const Tensor& scale, int64_t cols, const char* letter) const;
  void absent(const char* name, const OptionalTensor& t, const std::string& why) const;
  // On its device.
  void beside_weight(const char* name, const Tensor& t, const Tensor& w) const;
  template <class Sizes>
  void shape(const char* name, const Tensor& t, const Sizes& sizes, const std::string& why) const {
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    std::string expected;
    int64_t i = 0;
    for (const int64_t size : sizes) {
      expected += (i ? ", " : "") + std::to_string(size);
      same = same && t.size(i) == size;
      ++i;
    }
    require(same, [&] {
      return std::string(name) + " must have shape [" + expected + "] (" + why + "), got " + shape_text(t);
    });
  }
  [[noreturn]] void fail(const std::string& message) const;
  const char* op_;
};

}  // namespace moelora::ops
