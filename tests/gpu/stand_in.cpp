// What PyTorch asks of a CUDA device when it only keeps books about one: which is current, its streams and events.
// Nothing computes here; stand_in.py executes every operation on the processor.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

constexpr DeviceType cuda = DeviceType::CUDA;

struct StandIn : NoOpDeviceGuardImpl<cuda> {
  Device exchangeDevice(Device) const override { return {cuda, 0}; }
  Device getDevice() const override { return {cuda, 0}; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(cuda, 0)); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(CUDA, StandIn)

}  // namespace c10::impl

namespace at {

struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
