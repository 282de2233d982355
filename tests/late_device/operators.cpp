// The late device's operators. Each is the CPU's, submitted to the current stream; what it gives is known
// beforehand from the meta device. What has no meta kernel, or gives no tensors, runs after all before it.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <algorithm>

#include "queues.h"

namespace late {

bool is_pinned(const void* data);

namespace {

using torch::jit::Stack;

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Streams& streams() { return Streams::all(); }

void wait() { streams().reach(current_stream, streams().submitted(current_stream)); }

// Kernels only, whatever the thread that happens to wait has switched on.
struct Plain {
  c10::impl::ForceDispatchKeyGuard keys{
      c10::DispatchKeySet(c10::DispatchKey::BackendSelect),
      c10::default_excluded_set | c10::autograd_dispatch_keyset |
          c10::DispatchKeySet(
              {c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
  c10::AutoGradMode grad{false};
};

bool is_late(const at::Tensor& t) { return t.defined() && t.is_privateuseone(); }

// The same memory, seen by the CPU's kernels; keeps nothing alive.
at::Tensor alias(const at::Tensor& t) {
  auto options = at::TensorOptions().dtype(t.dtype()).device(c10::kCPU);
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [](void*) {}, options, c10::Device(c10::kCPU));
}

at::Tensor on_host(const at::Tensor& t) { return is_late(t) ? alias(t) : t; }

at::Tensor on_meta(const at::Tensor& t) {
  if (!t.defined() || t.unsafeGetTensorImpl()->is_wrapped_number()) return t;
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(c10::kMeta).pinned_memory(std::nullopt));
}

at::Tensor empty_like_meta(const at::Tensor& m) {
  return at::Tensor(at::detail::empty_strided_generic(
      m.sizes(), m.strides(), c10::GetAllocator(c10::DeviceType::PrivateUse1), kKeys, m.scalar_type()));
}

// A scalar of the CPU is read when the call is made, as a launch reads it.
at::Tensor captured(const at::Tensor& t) { return is_late(t) || !t.defined() ? on_host(t) : t.clone(); }

template <class F>
c10::IValue mapped(const c10::IValue& value, const F& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> out;
    for (const at::Tensor& t : value.toTensorList()) out.push_back(f(t));
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) {
      out.push_back(t ? std::optional<at::Tensor>(f(*t)) : std::nullopt);
    }
    return out;
  }
  if (value.isDevice() && value.toDevice().is_privateuseone()) return value;
  return value;
}

template <class F>
Stack mapped(const Stack& stack, const F& f) {
  Stack out;
  for (const c10::IValue& value : stack) out.push_back(mapped(value, f));
  return out;
}

void set_devices(Stack& stack, c10::Device device) {
  for (c10::IValue& value : stack) {
    if (value.isDevice()) value = device;
  }
}

bool writes(const c10::FunctionSchema& schema) {
  for (const auto& argument : schema.arguments()) {
    if (argument.alias_info() && argument.alias_info()->isWrite()) return true;
  }
  return false;
}

void take_results(Stack& from, std::vector<at::Tensor>& to) {
  for (const c10::IValue& value : from) {
    if (value.isTensor()) to.push_back(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorList()) to.push_back(t);
    }
  }
}

bool only_tensors(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns()) {
    if (!result.type()->isSubtypeOf(*c10::TensorType::get()) &&
        !result.type()->isSubtypeOf(*c10::ListType::ofTensors())) {
      return false;
    }
  }
  return !schema.returns().empty();
}

// The arguments that are written to and returned.
Stack written(const c10::FunctionSchema& schema, const Stack& arguments) {
  Stack out;
  for (const auto& result : schema.returns()) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto* alias = schema.arguments()[i].alias_info();
      if (alias && result.alias_info() && alias->beforeSets() == result.alias_info()->beforeSets()) {
        out.push_back(arguments[i]);
      }
    }
  }
  return out;
}

Stack run_now(const c10::OperatorHandle& op, const Stack& arguments) {
  wait();
  Stack host = mapped(arguments, on_host);
  set_devices(host, c10::Device(c10::kCPU));
  {
    Guard guard(lock());
    Plain plain;
    op.callBoxed(&host);
  }
  return mapped(host, [](const at::Tensor& t) {
    if (!t.defined()) return t;
    at::Tensor out = empty_like_meta(t);
    at::Tensor to = on_host(out);
    streams().submit(current_stream, [to, t]() mutable {
      Plain plain;
      to.copy_(t);
    });
    return out;
  });
}

std::optional<Stack> results_by_meta(const c10::OperatorHandle& op, const Stack& arguments) {
  Stack meta = mapped(arguments, on_meta);
  set_devices(meta, c10::Device(c10::kMeta));
  try {
    c10::impl::ExcludeDispatchKeyGuard no_gradients(c10::autograd_dispatch_keyset);
    op.callBoxed(&meta);
  } catch (const std::exception&) {
    return std::nullopt;  // what is wrong with the arguments the CPU's kernel will tell
  }
  return mapped(meta, [](const at::Tensor& t) { return t.defined() ? empty_like_meta(t) : t; });
}

// An empty `out` takes the shape of what it is to hold.
void shape(const c10::OperatorHandle& op, const Stack& arguments, const Stack& out) {
  std::vector<at::Tensor> to, like;
  Stack results = out;
  take_results(results, to);
  if (std::none_of(to.begin(), to.end(), [](const at::Tensor& t) { return is_late(t) && !t.numel(); })) {
    return;
  }
  Stack meta = mapped(arguments, on_meta);
  set_devices(meta, c10::Device(c10::kMeta));
  c10::impl::ExcludeDispatchKeyGuard no_gradients(c10::autograd_dispatch_keyset);
  op.callBoxed(&meta);
  take_results(meta, like);
  for (size_t i = 0; i < to.size(); ++i) {
    if (to[i].sizes() != like[i].sizes()) at::native::resize_(to[i], like[i].sizes());
  }
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = op.schema();
  Stack arguments = torch::jit::pop(*stack, schema.arguments().size()), results;
  const bool in_place = writes(schema);
  if (in_place) {
    results = written(schema, arguments);
    shape(op, arguments, results);
  } else {
    auto found = only_tensors(schema) ? results_by_meta(op, arguments) : std::nullopt;
    if (!found) {
      for (auto& value : run_now(op, arguments)) stack->push_back(std::move(value));
      return;
    }
    results = std::move(*found);
  }
  Stack host = mapped(arguments, captured);
  set_devices(host, c10::Device(c10::kCPU));
  std::vector<at::Tensor> to;
  if (!in_place) {
    Stack aliases = mapped(results, on_host);
    take_results(aliases, to);
  }
  streams().submit(current_stream, [op, host = std::move(host), to = std::move(to)]() mutable {
    Plain plain;
    op.callBoxed(&host);
    std::vector<at::Tensor> from;
    if (!to.empty()) take_results(host, from);
    for (size_t i = 0; i < to.size(); ++i) {
      if (to[i].defined()) to[i].copy_(from[i]);
    }
  });
  for (auto& value : results) stack->push_back(std::move(value));
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::Tensor(at::detail::empty_generic(size, c10::GetAllocator(c10::DeviceType::PrivateUse1), kKeys,
                                              c10::dtype_or_default(dtype), format));
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::Tensor(at::detail::empty_strided_generic(size, stride, c10::GetAllocator(c10::DeviceType::PrivateUse1),
                                                      kKeys, c10::dtype_or_default(dtype)));
}

// As between a host and its device: without page-locked memory, and where it may block, it waits.
at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.sizes() != source.sizes()) {
    at::Tensor wide = source.expand(self.sizes());
    return copy(self, wide, non_blocking);
  }
  const bool to_device = is_late(self), from_device = is_late(source);
  if (to_device != from_device) {
    auto& count = to_device ? streams().counts.host_to_device : streams().counts.device_to_host;
    count += static_cast<int64_t>(source.nbytes());
  }
  at::Tensor to = alias(self);
  at::Tensor from = from_device || (non_blocking && is_pinned(source.data_ptr())) ? alias(source) : source.clone();
  streams().submit(current_stream, [to, from]() mutable {
    Plain plain;
    to.copy_(from);
  });
  if (!to_device && !(non_blocking && is_pinned(self.data_ptr()))) wait();
  return self;
}

at::Scalar scalar(const at::Tensor& self) {
  wait();
  return on_host(self).item();
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  wait();
  return at::native::resize_(self, size, format);
}

void record_stream(at::Tensor& self, c10::Stream stream) { Blocks::all().record(self.storage().data(), stream.id()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("_local_scalar_dense", &scalar);
  m.impl("record_stream", &record_stream);
}

// Autocast changes nothing here.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace
}  // namespace late
