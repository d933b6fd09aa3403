// Dynamic shared memory and kernel launches. Both are spelled differently in the emulator (tests/cuda/emulator), so no
// other file uses `extern __shared__` or `<<<>>>`.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

// Declares `name`, a pointer to the block's dynamic shared memory. All declarations in a kernel point to the same
// bytes.
#ifndef ICSD_DYNAMIC_SHARED
#define ICSD_DYNAMIC_SHARED(type, name)                         \
  extern __shared__ __align__(128) unsigned char icsd_shared[]; \
  type* const name = reinterpret_cast<type*>(icsd_shared)
#endif

namespace icsd::cuda {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
  }
}

inline std::atomic<std::uint64_t> launched{0};  // number of kernels this process has launched

// Launches `kernel` with `shared` bytes of dynamic shared memory on `stream`; throws if the launch is refused. If
// `early`, it may be launched before the previous kernel has finished.
template <class... Parameters, class... Arguments>
void launch_kernel(bool early, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared,
                   cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config = {grid, block, shared, stream, &attribute, early ? 1u : 0u};
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  ++launched;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
            Arguments&&... arguments) {
  launch_kernel(false, kernel, grid, block, shared, stream, static_cast<Arguments&&>(arguments)...);
}

// Waits until the previous kernel has finished and all it wrote is visible. A kernel for `launch_early` must call this
// in every thread, before it accesses memory; then a kernel after it may rely on all kernels before it, too.
__device__ inline void wait_for_previous() {
#ifdef ICSD_EMULATED
  emulator::wait_for_previous();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel be launched as soon as all blocks have come here. It waits for what this kernel still does.
__device__ inline void admit_next() {
#if !defined(ICSD_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace icsd::cuda
