// The two things of a kernel that are spelled differently where it runs elsewhere than on a GPU: its dynamic shared
// memory and its launch. No other file says `extern __shared__` or `<<<>>>`.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

// Declares `name`, a pointer to the block's dynamic shared memory. All declarations in a kernel name the same bytes.
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

inline std::atomic<std::uint64_t> launched{0};  // kernels, by this process

// Starts `kernel` with `shared` bytes of dynamic shared memory on `stream`; throws if it cannot be started.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
            Arguments&&... arguments) {
  const cudaLaunchConfig_t config = {grid, block, shared, stream, nullptr, 0};
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  ++launched;
}

}  // namespace icsd::cuda
