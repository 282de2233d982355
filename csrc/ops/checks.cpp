#include "ops/checks.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>

namespace moelora::ops {
namespace {

std::string text(int64_t v) { return std::to_string(v); }

bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half; }

}  // namespace

std::string dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    case ScalarType::Float8_e4m3fn: return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "torch.float8_e5m2";
    case ScalarType::Float8_e8m0fnu: return "torch.float8_e8m0fnu";
    default: return "an unsupported dtype";
  }
}

std::string dtype_text(const Tensor& t) { return dtype_text(t.scalar_type()); }

std::string shape_text(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + text(t.size(i));
  return s + "]";
}

std::string number_text(double value) {
  if (std::isnan(value)) return "nan";
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%g", value);
  return buffer;
}

void Checker::fail(const std::string& message) const { throw std::runtime_error(std::string(op_) + ": " + message); }

CheckedRouting Checker::routing(const Tensor& slots, const Tensor& offsets, int64_t top_k) const {
  require(top_k >= 1, [&] { return "top_k must be at least 1, got " + text(top_k); });
  require(slots.dim() == 1,
          [&] { return "sorted_scattered_idxs must be a 1-D tensor [S], got shape " + shape_text(slots); });
  require(slots.scalar_type() == ScalarType::Long,
          [&] { return "sorted_scattered_idxs must have dtype torch.int64, got " + dtype_text(slots); });
  const int64_t s = slots.size(0);
  require(s % top_k == 0, [&] {
    return "sorted_scattered_idxs must have a length that is a multiple of top_k=" + text(top_k) + ", got " + text(s);
  });
  require(s <= std::numeric_limits<int32_t>::max(),
          [&] { return "sorted_scattered_idxs must have a length of at most 2147483647, got " + text(s); });
  require(offsets.dim() == 1,
          [&] { return "expert_offsets must be a 1-D tensor [E], got shape " + shape_text(offsets); });
  require(offsets.scalar_type() == ScalarType::Int,
          [&] { return "expert_offsets must have dtype torch.int32, got " + dtype_text(offsets); });
  require(offsets.size(0) >= 1, [&] { return std::string("expert_offsets must have a length of at least 1, got 0"); });
  CheckedRouting checked{torch::stable::contiguous(slots), torch::stable::contiguous(offsets), {}};
  checked.routing = {static_cast<const int64_t*>(checked.sorted_scattered_idxs.const_data_ptr()),
                     static_cast<const int32_t*>(checked.expert_offsets.const_data_ptr()), offsets.size(0), s, top_k};
  return checked;
}

void Checker::x(const Tensor& x, const Routing& r, bool x_grouped) const {
  require(x.dim() == 2, [&] {
    return std::string("x must be a 2-D tensor ") + (x_grouped ? "[S, K]" : "[T, K]") + ", got shape " + shape_text(x);
  });
  const int64_t rows = x_grouped ? r.slots : r.tokens();
  require(x.size(0) == rows, [&] {
    return "x must have " + text(rows) +
           (x_grouped ? " rows (S, because x_grouped is True)" : " rows (T, because x_grouped is False)") +
           ", got shape " + shape_text(x);
  });
}

void Checker::dy(const Tensor& dy, const Routing& r, bool gated) const {
  require(dy.dim() == 2, [&] {
    return std::string("dy must be a 2-D tensor ") + (gated ? "[T, N]" : "[S, N]") + ", got shape " + shape_text(dy);
  });
  const int64_t rows = gated ? r.tokens() : r.slots;
  require(dy.size(0) == rows, [&] {
    return "dy must have " + text(rows) +
           (gated ? " rows (T, because gates is given)" : " rows (S, because gates is None)") + ", got shape " +
           shape_text(dy);
  });
}

void Checker::floating(const char* name, const Tensor& t) const {
  const ScalarType s = t.scalar_type();
  require(is_half(t) || s == ScalarType::Float || s == ScalarType::Double, [&] {
    return std::string(name) + " must have dtype torch.bfloat16, torch.float16, torch.float32 or torch.float64, got " +
           dtype_text(t);
  });
}

void Checker::integer(const char* name, const Tensor& t) const {
  require(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long,
          [&] { return std::string(name) + " must have dtype torch.int32 or torch.int64, got " + dtype_text(t); });
}

void Checker::like(const char* name, const Tensor& t, const char* lead_name, const Tensor& lead, bool or_fp32) const {
  const bool fp32_too = or_fp32 && is_half(lead);
  require(t.scalar_type() == lead.scalar_type() || (fp32_too && t.scalar_type() == ScalarType::Float), [&] {
    return std::string(name) + " must have dtype " + dtype_text(lead) + " (that of " + lead_name + ")" +
           (fp32_too ? " or torch.float32" : "") + ", got " + dtype_text(t);
  });
}

void Checker::columns(const char* name, const Tensor& t, const char* letter, int64_t size, const char* owner) const {
  require(t.size(1) == size, [&] {
    return std::string(name) + " must have " + text(size) + " columns (" + letter + " of " + owner + "), got shape " +
           shape_text(t);
  });
}

void Checker::lora(const OptionalTensor& a, const OptionalTensor& b, const char* lead_name, const Tensor& lead,
                   int64_t e, int64_t n, int64_t k) const {
  require(a.has_value() == b.has_value(), [&] {
    return std::string("lora_a and lora_b must be given together, got only ") + (a ? "lora_a" : "lora_b");
  });
  if (!a) return;
  require(a->dim() == 3 && a->size(0) == e && a->size(2) == k, [&] {
    return "lora_a must have shape [" + text(e) + ", R, " + text(k) + "] (E=" + text(e) + ", K=" + text(k) + "), got " +
           shape_text(*a);
  });
  const int64_t r = a->size(1);
  require(r >= 1, [&] { return "lora_a must have a rank R of at least 1, got shape " + shape_text(*a); });
  require(k >= 1, [&] { return "lora_a must have a K of at least 1, got shape " + shape_text(*a); });
  like("lora_a", *a, lead_name, lead, true);
  require(b->dim() == 3 && b->size(0) == e && b->size(1) == n && b->size(2) == r, [&] {
    return "lora_b must have shape [" + text(e) + ", " + text(n) + ", " + text(r) + "] (E=" + text(e) +
           ", N=" + text(n) + ", R=" + text(r) + " of lora_a), got " + shape_text(*b);
  });
  require(n >= 1, [&] { return "lora_b must have an N of at least 1, got shape " + shape_text(*b); });
  like("lora_b", *b, "lora_a", *a);
}

void Checker::finite(const char* name, double value) const {
  require(std::isfinite(value), [&] { return std::string(name) + " must be finite, got " + number_text(value); });
}

void Checker::bias(const OptionalTensor& bias, const char* lead_name, const Tensor& lead, int64_t e, int64_t n) const {
  if (!bias) return;
  require(bias->dim() == 2 && bias->size(0) == e && bias->size(1) == n, [&] {
    return "bias must have shape [" + text(e) + ", " + text(n) + "] (E=" + text(e) + ", N=" + text(n) + "), got " +
           shape_text(*bias);
  });
  like("bias", *bias, lead_name, lead, true);
}

void Checker::gates(const OptionalTensor& gates, const char* lead_name, const Tensor& lead, const Routing& r,
                    bool y_grouped) const {
  if (!gates) return;
  require(!y_grouped, [&] { return "gates must be None when y_grouped is True, got shape " + shape_text(*gates); });
  require(gates->dim() == 2 && gates->size(0) == r.tokens() && gates->size(1) == r.top_k, [&] {
    return "gates must have shape [" + text(r.tokens()) + ", " + text(r.top_k) + "] (T=S/top_k, top_k), got " +
           shape_text(*gates);
  });
  like("gates", *gates, lead_name, lead, true);
}

void Checker::contents(Routing& r) const {
  const IndexCheck found = check_contents(r);
  const std::string at = " at position " + text(found.position);
  switch (found.fault) {
    case IndexFault::none: return;
    case IndexFault::offset_range:
      fail("expert_offsets must have values in [0, " + text(r.slots) + "], got " + text(found.value) + at);
    case IndexFault::offset_order:
      fail("expert_offsets must be non-decreasing, got " + text(found.value) + " after " + text(found.previous) + at);
    case IndexFault::slot_range:
      fail("sorted_scattered_idxs must have values in [0, " + text(r.slots) + "), got " + text(found.value) + at);
    case IndexFault::slot_twice:
      fail("sorted_scattered_idxs must be a permutation of [0, " + text(r.slots) + "), got " + text(found.value) +
           " twice");
  }
}

}  // namespace moelora::ops
