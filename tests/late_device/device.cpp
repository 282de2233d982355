// A device for PrivateUse1 over host memory: its streams are late, its kernels are the CPU's. For tests only.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>

#include "queues.h"

namespace late {
namespace {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);

Streams& streams() { return Streams::all(); }

c10::Stream as_stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return as_stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return as_stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return as_stream(streams().add()); }
  c10::Stream getNewStream(c10::Device, int) const override { return as_stream(streams().add()); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return as_stream(std::exchange(current_stream, stream.id()));
  }
  bool queryStream(const c10::Stream& stream) const override {
    return streams().reached(stream.id(), streams().submitted(stream.id()));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    ++streams().counts.stream_synchronisations;
    streams().reach(stream.id(), streams().submitted(stream.id()));
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    ++streams().counts.device_synchronisations;
    streams().reach_all();
  }

  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Event();
    *static_cast<Event*>(*event) = {stream.id(), streams().submitted(stream.id())};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (!event) return;
    const Event until = *static_cast<Event*>(event);
    streams().submit(stream.id(), [until] { streams().reach(until.stream, until.ticket); });
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    const Event until = *static_cast<Event*>(event);
    return streams().reached(until.stream, until.ticket);
  }
  void synchronizeEvent(void* event) const override {
    if (!event) return;
    ++streams().counts.event_synchronisations;
    const Event until = *static_cast<Event*>(event);
    streams().reach(until.stream, until.ticket);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    Blocks::all().record(data.get(), stream.id());
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard);

void give(void* data) {
  if (data) Blocks::all().give(data);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? Blocks::all().take(size) : nullptr;
    return {data, data, &give, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, size_t size) const override {
    streams().submit(current_stream, [=] { std::memcpy(to, from, size); });
  }
};

// Page-locked memory, which late copies may read and write: kept for the next who asks, never unmapped.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    Guard guard(lock());
    const size_t rounded = (size + 511) / 512 * 512 + 512;
    auto& free = free_blocks()[rounded];
    void* data;
    if (free.empty()) {
      data = ::aligned_alloc(64, rounded);
      sizes()[data] = rounded;
      streams().counts.pinned += static_cast<int64_t>(rounded);
    } else {
      data = free.back();
      free.pop_back();
    }
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }

  static bool has(const void* data) {
    Guard guard(lock());
    auto after = sizes().upper_bound(const_cast<void*>(data));
    if (after == sizes().begin()) return false;
    const auto& [start, size] = *std::prev(after);
    return data < static_cast<const char*>(start) + size;
  }

 private:
  static std::map<void*, size_t>& sizes() {
    static auto* found = new std::map<void*, size_t>();
    return *found;
  }
  static std::map<size_t, std::vector<void*>>& free_blocks() {
    static auto* found = new std::map<size_t, std::vector<void*>>();
    return *found;
  }
  static void release(void* data) {
    Guard guard(lock());
    free_blocks()[sizes()[data]].push_back(data);
  }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::has(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
};

const bool registered = [] {
  c10::SetAllocator(kType, &device_allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

}  // namespace

bool is_pinned(const void* data) { return PinnedAllocator::has(data); }

}  // namespace late

extern "C" {
void late_set_eager(int eager) { late::Streams::all().eager = eager; }
void late_counts(int64_t* to) { std::memcpy(to, &late::Streams::all().counts, sizeof(late::Counts)); }
void late_reset_peak() { late::Streams::all().counts.peak = late::Streams::all().counts.bytes; }
void late_set_current_stream(int64_t id) { late::current_stream = id; }
}
