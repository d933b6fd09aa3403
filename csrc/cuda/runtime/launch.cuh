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

// Launches `kernel` with `shared` bytes of dynamic shared memory on `stream`; throws if the launch is refused.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
            Arguments&&... arguments) {
  const cudaLaunchConfig_t config = {grid, block, shared, stream, nullptr, 0};
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  ++launched;
}

}  // namespace icsd::cuda
