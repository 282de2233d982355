// The drivers on arrays that the caller provides. Arguments are those of the operators, behind the kernel set and
// `out`; a packed weight is one of them, a `Packed`.
#include "driver/drivers.h"

#include <limits>
#include <thread>
#include <variant>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/packed.h"

namespace moelora {
namespace {

void run_threads(int64_t times, void (*body)(void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < times; ++i) threads.emplace_back(body, context);
  body(context);
  for (std::thread& t : threads) t.join();
}

Arena& thread_arena() {
  static thread_local Arena arena;
  return arena;
}

Runtime runtime(int64_t threads) {
  require(threads >= 1 && threads <= 64, "threads must be in [1, 64]");
  return {threads, run_threads, thread_arena};
}

// Integer arrays are checked by type here, `Array` is for numbers.
template <class T>
T* integers(const char* name, const py::array& array, int64_t size) {
  const bool fits = array.dtype().kind() == 'i' && array.dtype().itemsize() == sizeof(T) && array.ndim() == 1 &&
                    (size < 0 || array.shape(0) == size) && (array.flags() & py::array::c_style);
  require(fits, std::string(name) + " must be a contiguous int" + std::to_string(8 * sizeof(T)) + " array [" +
                    (size < 0 ? "any" : std::to_string(size)) + "], got " + std::string(py::str(array.dtype())) + " " +
                    shape_text(array));
  return const_cast<T*>(static_cast<const T*>(array.data()));
}

Routing routing_of(const py::array& slots, const py::array& offsets, int64_t top_k) {
  require(top_k >= 1, "top_k must be at least 1");
  Routing r;
  r.sorted_scattered_idxs = integers<int64_t>("slots", slots, -1);
  r.expert_offsets = integers<int32_t>("offsets", offsets, -1);
  r.slots = slots.shape(0);
  r.experts = offsets.shape(0);
  r.top_k = top_k;
  require(r.slots % top_k == 0 && r.slots <= std::numeric_limits<int32_t>::max(),
          "slots must have a length that is a multiple of top_k and fits 32 bits");
  require(r.experts >= 1, "offsets must not be empty");
  switch (check_contents(r).fault) {
    case IndexFault::none: return r;
    case IndexFault::offset_range: throw py::value_error("offsets out of range");
    case IndexFault::offset_order: throw py::value_error("offsets decrease");
    case IndexFault::slot_range: throw py::value_error("slots out of range");
    case IndexFault::slot_twice: throw py::value_error("slots hold a value twice");
  }
  return r;
}

// What all contractions have in common; x and dy have storage type `dtype`.
struct Problem {
  const KernelChoice& choice;
  Routing routing;
  std::vector<double> gate_values;
  const double* gates = nullptr;
  RowOrder x_order, y_order;

  Problem(const KernelChoice& kernels, const py::array& slots, const py::array& offsets, int64_t top_k,
          const OptionalArray& gate_array, bool x_grouped, bool y_grouped)
      : choice(kernels), routing(routing_of(slots, offsets, top_k)) {
    x_order = x_grouped ? RowOrder::grouped : RowOrder::token;
    y_order = gate_array ? RowOrder::token : y_grouped ? RowOrder::grouped : RowOrder::scattered;
    if (!gate_array) return;
    require(!y_grouped, "gates must be None when y_grouped is True");
    const Array array("gates", *gate_array);
    array.shape({routing.tokens(), top_k});
    gate_values.resize(static_cast<size_t>(routing.slots));
    read_gates(array.matrix(), gate_values.data());
    gates = gate_values.data();
  }

  int64_t rows_of(RowOrder order) const { return order == RowOrder::token ? routing.tokens() : routing.slots; }

  // x, dy and weights: a type that these kernels compute in or widen.
  Array operand(const char* name, const py::array& array) const {
    const Array a(name, array);
    for_storage(choice.kernels->pack_lanes, *choice.kernels, name, a.dtype());
    require(size_of(a.dtype()) <= size_of(choice.kernels->compute), std::string(name) + " would lose precision");
    return a;
  }
  RowsIn rows(const char* name, const py::array& array, RowOrder order, int64_t columns) const {
    return {operand(name, array).shape({rows_of(order), columns}).matrix(), order};
  }
  void* out_rows(const py::array& array, RowOrder order, int64_t columns, DType dtype) const {
    return Array("out", array).shape({rows_of(order), columns}).dtype(dtype).contiguous().mutable_data();
  }
  Weights weight(const WeightArray& array, DType dtype) const {
    const auto* packed = std::get_if<PackedArrays>(&array);
    if (!packed)
      return {Array("weight", std::get<py::array>(array)).shape({routing.experts, -1, -1}).dtype(dtype).experts()};
    const Weights w = packed->weights(dtype);
    require(w.numbers.experts == routing.experts, "weight must have as many experts as offsets");
    for_storage(choice.kernels->unpack[static_cast<int>(w.packed.code)], *choice.kernels, "weight", dtype);
    return w;
  }
  Lora lora(const OptionalArray& a, const OptionalArray& b, double scaling, int64_t n, int64_t k) const {
    require(a.has_value() == b.has_value(), "lora_a and lora_b must be given together");
    if (!a) return {};
    const Array down("lora_a", *a), up("lora_b", *b);
    down.shape({routing.experts, -1, k});
    up.shape({routing.experts, n, down.size(1)}).dtype(down.dtype());
    for_storage(choice.kernels->pack_lanes, *choice.kernels, "lora_a", down.dtype());
    return {down.experts(), up.experts(), scaling};
  }
  Matrix bias(const OptionalArray& array, int64_t n) const {
    if (!array) return {};
    const Array b("bias", *array);
    for_storage(choice.kernels->add_row, *choice.kernels, "bias", b.dtype());
    return b.shape({routing.experts, n}).matrix();
  }
};

void forward_arrays(const KernelChoice& choice, const py::array& out, const py::array& x, const WeightArray& weight,
                    const py::array& slots, const py::array& offsets, int64_t top_k, const OptionalArray& lora_a,
                    const OptionalArray& lora_b, double scaling, const OptionalArray& bias, const OptionalArray& gates,
                    bool x_grouped, bool y_grouped, int64_t threads) {
  const Problem p(choice, slots, offsets, top_k, gates, x_grouped, y_grouped);
  const DType t = p.operand("x", x).dtype();
  const Weights w = p.weight(weight, t);
  forward(choice,
          {.routing = p.routing,
           .x = p.rows("x", x, p.x_order, w.cols()),
           .weight = w,
           .lora = p.lora(lora_a, lora_b, scaling, w.rows(), w.cols()),
           .bias = p.bias(bias, w.rows()),
           .gates = p.gates,
           .y = p.out_rows(out, p.y_order, w.rows(), t),
           .y_dtype = t,
           .y_order = p.y_order},
          runtime(threads));
}

InputGradient input_gradient_of(const Problem& p, const py::array& out, const OptionalArray& out_gates,
                                const py::array& dy, const WeightArray& weight, const OptionalArray& lora_a,
                                const OptionalArray& lora_b, double scaling, const OptionalArray& bias,
                                const RowsIn& x) {
  const DType t = p.operand("dy", dy).dtype();
  const Weights w = p.weight(weight, t);
  require(x.matrix.data == nullptr || x.matrix.cols == w.cols(), "x must have as many columns as weight");
  void* dgates = nullptr;
  if (out_gates)
    dgates = Array("out_gates", *out_gates)
                 .shape({p.routing.tokens(), p.routing.top_k})
                 .dtype(accumulator_type(*p.choice.kernels))
                 .contiguous()
                 .mutable_data();
  return {.routing = p.routing,
          .dy = p.rows("dy", dy, p.y_order, w.rows()),
          .weight = w,
          .lora = p.lora(lora_a, lora_b, scaling, w.rows(), w.cols()),
          .bias = p.bias(bias, w.rows()),
          .gates = p.gates,
          .x = x,
          .dx = p.out_rows(out, p.x_order, w.cols(), t),
          .dx_dtype = t,
          .dx_order = p.x_order,
          .dgates = dgates};
}

void input_gradient_arrays(const KernelChoice& choice, const py::array& out, const OptionalArray& out_gates,
                           const py::array& dy, const WeightArray& weight, const py::array& slots,
                           const py::array& offsets, int64_t top_k, const OptionalArray& lora_a,
                           const OptionalArray& lora_b, double scaling, const OptionalArray& bias,
                           const OptionalArray& gates, const OptionalArray& x, bool x_grouped, bool y_grouped,
                           int64_t threads) {
  const Problem p(choice, slots, offsets, top_k, gates, x_grouped, y_grouped);
  require(out_gates.has_value() == (gates && x), "out_gates must be given where gates and x are, and only there");
  const RowsIn rows = x ? p.rows("x", *x, p.x_order, -1) : RowsIn{};
  input_gradient(choice, input_gradient_of(p, out, out_gates, dy, weight, lora_a, lora_b, scaling, bias, rows),
                 runtime(threads));
}

LoraGradient lora_gradient_of(const Problem& p, const py::array& out_a, const py::array& out_b, const py::array& dy,
                              const py::array& x, const py::array& lora_a, const py::array& lora_b, double scaling) {
  const RowsIn grad = p.rows("dy", dy, p.y_order, -1), rows = p.rows("x", x, p.x_order, -1);
  const Lora lora = p.lora(lora_a, lora_b, scaling, grad.matrix.cols, rows.matrix.cols);
  const Array da("out_a", out_a), db("out_b", out_b);
  da.shape({lora.a.experts, lora.a.rows, lora.a.cols}).dtype(lora.a.dtype).contiguous();
  db.shape({lora.b.experts, lora.b.rows, lora.b.cols}).dtype(lora.a.dtype).contiguous();
  return {.routing = p.routing,
          .dy = grad,
          .x = rows,
          .lora = lora,
          .gates = p.gates,
          .da = da.mutable_data(),
          .db = db.mutable_data()};
}

void lora_gradient_arrays(const KernelChoice& choice, const py::array& out_a, const py::array& out_b,
                          const py::array& dy, const py::array& x, const py::array& slots, const py::array& offsets,
                          int64_t top_k, const py::array& lora_a, const py::array& lora_b, double scaling,
                          const OptionalArray& gates, bool x_grouped, bool y_grouped, int64_t threads) {
  const Problem p(choice, slots, offsets, top_k, gates, x_grouped, y_grouped);
  lora_gradient(choice, lora_gradient_of(p, out_a, out_b, dy, x, lora_a, lora_b, scaling), runtime(threads));
}

void input_and_lora_gradient_arrays(const KernelChoice& choice, const py::array& out, const OptionalArray& out_gates,
                                    const py::array& out_a, const py::array& out_b, const py::array& dy,
                                    const py::array& x, const WeightArray& weight, const py::array& slots,
                                    const py::array& offsets, int64_t top_k, const py::array& lora_a,
                                    const py::array& lora_b, double scaling, const OptionalArray& bias,
                                    const OptionalArray& gates, bool x_grouped, bool y_grouped, int64_t threads) {
  const Problem p(choice, slots, offsets, top_k, gates, x_grouped, y_grouped);
  require(!out_gates || gates, "out_gates must be None when gates are");
  const RowsIn none{};
  const InputGradient dx = input_gradient_of(p, out, out_gates, dy, weight, lora_a, lora_b, scaling, bias,
                                             out_gates ? p.rows("x", x, p.x_order, -1) : none);
  input_and_lora_gradient(choice, dx, lora_gradient_of(p, out_a, out_b, dy, x, lora_a, lora_b, scaling),
                          runtime(threads));
}

void weight_gradient_arrays(const KernelChoice& choice, const py::array& out, const py::array& dy, const py::array& x,
                            const py::array& slots, const py::array& offsets, int64_t top_k, const OptionalArray& gates,
                            bool x_grouped, bool y_grouped, int64_t threads) {
  const Problem p(choice, slots, offsets, top_k, gates, x_grouped, y_grouped);
  const RowsIn grad = p.rows("dy", dy, p.y_order, -1), rows = p.rows("x", x, p.x_order, -1);
  const Array dw("out", out);
  dw.shape({p.routing.experts, grad.matrix.cols, rows.matrix.cols}).dtype(rows.matrix.dtype).contiguous();
  weight_gradient(choice, {.routing = p.routing, .dy = grad, .x = rows, .gates = p.gates, .dw = dw.mutable_data()},
                  runtime(threads));
}

void bias_gradient_arrays(const KernelChoice& choice, const py::array& out, const py::array& dy, const py::array& slots,
                          const py::array& offsets, int64_t top_k, const OptionalArray& gates, bool y_grouped,
                          int64_t threads) {
  const Problem p(choice, slots, offsets, top_k, gates, false, y_grouped);
  const RowsIn grad = p.rows("dy", dy, p.y_order, -1);
  const Array dbias("out", out);
  dbias.shape({p.routing.experts, grad.matrix.cols}).dtype(grad.matrix.dtype).contiguous();
  bias_gradient(choice, {.routing = p.routing, .dy = grad, .gates = p.gates, .dbias = dbias.mutable_data()},
                runtime(threads));
}

void flatten_sort_count_arrays(const py::array& slots, const py::array& offsets, const py::array& expert_idxs) {
  const int64_t width = expert_idxs.dtype().itemsize();
  require(expert_idxs.ndim() == 2 && expert_idxs.dtype().kind() == 'i' && (width == 4 || width == 8),
          "expert_idxs must be int32 or int64 [T, top_k], got shape " + shape_text(expert_idxs));
  require(expert_idxs.strides(0) % width == 0 && expert_idxs.strides(1) % width == 0,
          "expert_idxs must have strides of whole elements");
  const int64_t tokens = expert_idxs.shape(0), top_k = expert_idxs.shape(1);
  int64_t* to = integers<int64_t>("slots", slots, tokens * top_k);
  int32_t* counts = integers<int32_t>("offsets", offsets, -1);
  require(slots.writeable() && offsets.writeable(), "slots and offsets must be writeable");
  flatten_sort_count(expert_idxs.data(), width == 8, expert_idxs.strides(0) / width, expert_idxs.strides(1) / width,
                     tokens, top_k, offsets.shape(0), to, counts);
}

void glu_arrays(const KernelChoice& choice, const py::array& out, const py::array& h, const std::string& act,
                double alpha, std::optional<double> limit, double up_shift, bool interleaved, int64_t threads) {
  const Array from("h", h), to("out", out);
  from.dims(2);
  require(from.size(1) % 2 == 0, "h must have an even number of columns");
  for_storage(choice.kernels->glu, *choice.kernels, "h", from.dtype());
  to.shape({from.size(0), from.size(1) / 2}).dtype(from.dtype()).contiguous();
  glu(choice, from.matrix(), glu_args(act, alpha, limit, up_shift, interleaved), to.mutable_data(), runtime(threads));
}

void glu_backward_arrays(const KernelChoice& choice, const py::array& out, const py::array& dy, const py::array& h,
                         const std::string& act, double alpha, std::optional<double> limit, double up_shift,
                         bool interleaved, int64_t threads) {
  const Array from("h", h), grad("dy", dy), to("out", out);
  from.dims(2);
  require(from.size(1) % 2 == 0, "h must have an even number of columns");
  for_storage(choice.kernels->glu_backward, *choice.kernels, "h", from.dtype());
  grad.shape({from.size(0), from.size(1) / 2}).dtype(from.dtype());
  to.shape({from.size(0), from.size(1)}).dtype(from.dtype()).contiguous();
  glu_backward(choice, grad.matrix(), from.matrix(), glu_args(act, alpha, limit, up_shift, interleaved),
               to.mutable_data(), runtime(threads));
}

}  // namespace

void bind_drivers(py::module_& m) {
  using namespace py::literals;
  const py::none none;
  m.def("forward", forward_arrays, "kernels"_a, "out"_a, "x"_a, "weight"_a, "slots"_a, "offsets"_a, "top_k"_a,
        "lora_a"_a = none, "lora_b"_a = none, "scaling"_a = 1.0, "bias"_a = none, "gates"_a = none,
        "x_grouped"_a = false, "y_grouped"_a = false, py::kw_only(), "threads"_a = 1);
  m.def("input_gradient", input_gradient_arrays, "kernels"_a, "out"_a, "out_gates"_a.none(true), "dy"_a, "weight"_a,
        "slots"_a, "offsets"_a, "top_k"_a, "lora_a"_a = none, "lora_b"_a = none, "scaling"_a = 1.0, "bias"_a = none,
        "gates"_a = none, "x"_a = none, "x_grouped"_a = false, "y_grouped"_a = false, py::kw_only(), "threads"_a = 1);
  m.def("lora_gradient", lora_gradient_arrays, "kernels"_a, "out_a"_a, "out_b"_a, "dy"_a, "x"_a, "slots"_a, "offsets"_a,
        "top_k"_a, "lora_a"_a, "lora_b"_a, "scaling"_a = 1.0, "gates"_a = none, "x_grouped"_a = false,
        "y_grouped"_a = false, py::kw_only(), "threads"_a = 1);
  m.def("input_and_lora_gradient", input_and_lora_gradient_arrays, "kernels"_a, "out"_a, "out_gates"_a.none(true),
        "out_a"_a, "out_b"_a, "dy"_a, "x"_a, "weight"_a, "slots"_a, "offsets"_a, "top_k"_a, "lora_a"_a, "lora_b"_a,
        "scaling"_a = 1.0, "bias"_a = none, "gates"_a = none, "x_grouped"_a = false, "y_grouped"_a = false,
        py::kw_only(), "threads"_a = 1);
  m.def("weight_gradient", weight_gradient_arrays, "kernels"_a, "out"_a, "dy"_a, "x"_a, "slots"_a, "offsets"_a,
        "top_k"_a, "gates"_a = none, "x_grouped"_a = false, "y_grouped"_a = false, py::kw_only(), "threads"_a = 1);
  m.def("bias_gradient", bias_gradient_arrays, "kernels"_a, "out"_a, "dy"_a, "slots"_a, "offsets"_a, "top_k"_a,
        "gates"_a = none, "y_grouped"_a = false, py::kw_only(), "threads"_a = 1);
  m.def("flatten_sort_count", flatten_sort_count_arrays, "slots"_a, "offsets"_a, "expert_idxs"_a);
  m.def("glu", glu_arrays, "kernels"_a, "out"_a, "h"_a, "act"_a = "silu", "alpha"_a = 1.0, "limit"_a = none,
        "up_shift"_a = 0.0, "interleaved"_a = false, py::kw_only(), "threads"_a = 1);
  m.def("glu_backward", glu_backward_arrays, "kernels"_a, "out"_a, "dy"_a, "h"_a, "act"_a = "silu", "alpha"_a = 1.0,
        "limit"_a = none, "up_shift"_a = 0.0, "interleaved"_a = false, py::kw_only(), "threads"_a = 1);
}

}  // namespace moelora
