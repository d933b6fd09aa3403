#include "cuda/operator.h"
#include "cuda/runtime/device.cuh"

namespace icsd::cuda {
namespace {

// Returns true if this process uses the device already. Otherwise, to make it the current device would create a context
// there, which takes hundreds of megabytes of its memory.
bool has_context(int device) {
  using GetState = int (*)(int device, unsigned* flags, int* active);  // the driver's cuDevicePrimaryCtxGetState
  static const GetState get_state = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function, 7000, cudaEnableDefault, &found));
    return reinterpret_cast<GetState>(function);
  }();
  unsigned flags = 0;
  int active = 0;
  return !get_state || get_state(device, &flags, &active) || active;
}

// Returns CUDA's number of a version, 13010, as text, 13.1.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

DeviceGuard::DeviceGuard(int device) : device_(device) {
  check(cudaGetDevice(&previous_));
  if (device_ != previous_) check(cudaSetDevice(device_));
}

DeviceGuard::~DeviceGuard() {
  if (device_ != previous_ && has_context(previous_)) cudaSetDevice(previous_);
}

std::uint64_t launches() { return launched; }

Devices devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return {count, ""};
  cudaGetLastError();  // clears it
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver));
  check(cudaRuntimeGetVersion(&runtime));
  if (!driver) return {0, "no CUDA driver is installed"};
  if (status != cudaErrorInsufficientDriver) return {0, cudaGetErrorString(status)};
  return {0, "the driver is made for CUDA " + version_text(driver) + ", this build needs one for CUDA " +
                 version_text(runtime) + " or later"};
}

}  // namespace icsd::cuda
