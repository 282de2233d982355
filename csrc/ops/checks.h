// Argument checks of the CPU operators: the wording and the order of torch_moelora/checks.py. They raise before any
// work.
#pragma once

#include <string>

#include "ops/tensors.h"

namespace moelora::ops {

// The tensors' contiguous copies where needed, and the views of them.
struct CheckedRouting {
  Tensor sorted_scattered_idxs, expert_offsets;
  Routing routing;
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
  void weight(const Tensor& w, const char* lead_name, const Tensor& lead, const Routing& r) const;
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
  [[noreturn]] void fail(const std::string& message) const;
  const char* op_;
};

std::string shape_text(const Tensor& t);
std::string number_text(double value);

}  // namespace moelora::ops
