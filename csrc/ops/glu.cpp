#include <limits>

#include "ops/checks.h"

namespace moelora::ops {
namespace {

GluArgs check_glu(const Checker& check, const Tensor& h, const std::string& act, double alpha,
                  std::optional<double> limit, double up_shift, bool interleaved) {
  check.require(h.dim() == 2, [&] { return "h must be a 2-D tensor [rows, 2I], got shape " + shape_text(h); });
  check.floating("h", h);
  check.require(h.size(1) >= 2 && h.size(1) % 2 == 0,
                [&] { return "h must have an even number of columns, at least 2, got shape " + shape_text(h); });
  check.require(act == "silu" || act == "gelu" || act == "gelu_tanh",
                [&] { return "act must be silu, gelu or gelu_tanh, got " + act; });
  check.finite("alpha", alpha);
  check.require(act == "silu" || alpha == 1.0,
                [&] { return "alpha must be 1 when act is " + act + ", got " + number_text(alpha); });
  check.require(!limit || *limit > 0.0,
                [&] { return "limit must be None or greater than 0, got " + number_text(*limit); });
  check.finite("up_shift", up_shift);
  const Activation kind = act == "silu" ? Activation::silu : act == "gelu" ? Activation::gelu : Activation::gelu_tanh;
  return {kind, alpha, limit.value_or(std::numeric_limits<double>::infinity()), up_shift, interleaved};
}

Tensor glu(Tensor h, std::string act, double alpha, std::optional<double> limit, double up_shift, bool interleaved) {
  const GluArgs args = check_glu(Checker("glu"), h, act, alpha, limit, up_shift, interleaved);
  Tensor y = new_tensor(h, {h.size(0), h.size(1) / 2}, h.scalar_type());
  moelora::glu(kernels_for(dtype_of(h)), matrix_of(h), args, y.mutable_data_ptr(), runtime());
  return y;
}

Tensor glu_backward(Tensor dy, Tensor h, std::string act, double alpha, std::optional<double> limit, double up_shift,
                    bool interleaved) {
  const Checker check("glu_backward");
  const GluArgs args = check_glu(check, h, act, alpha, limit, up_shift, interleaved);
  check.require(dy.dim() == 2 && dy.size(0) == h.size(0) && dy.size(1) == h.size(1) / 2, [&] {
    return "dy must have shape [" + std::to_string(h.size(0)) + ", " + std::to_string(h.size(1) / 2) +
           "] (the rows and half the columns of h), got " + shape_text(dy);
  });
  check.like("dy", dy, "h", h);
  Tensor dh = new_tensor(h, {h.size(0), h.size(1)}, h.scalar_type());
  moelora::glu_backward(kernels_for(dtype_of(h)), matrix_of(dy), matrix_of(h), args, dh.mutable_data_ptr(), runtime());
  return dh;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("glu", TORCH_BOX(&glu));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}

}  // namespace moelora::ops
