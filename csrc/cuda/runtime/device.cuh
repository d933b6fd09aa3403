// Properties and limits of the current device.
#pragma once

#include "cuda/runtime/launch.cuh"

namespace icsd::cuda {

inline int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

// Returns true if the device multiplies tf32 and bfloat16 matrices. Kernels that do so are empty below sm_80.
inline bool has_tensor_cores() { return attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }

inline std::int64_t divide_up(std::int64_t count, std::int64_t by) { return (count + by - 1) / by; }

// Returns `count` as the width of a grid; throws if no grid is that wide.
inline unsigned blocks(std::int64_t count) {
  if (count > 0x7fffffff) throw std::invalid_argument("icsd: more blocks than a grid has; split the batch");
  return static_cast<unsigned>(count);
}

// Allows launches of `kernel` with `bytes` of dynamic shared memory.
template <class Kernel>
void allow_shared(Kernel* kernel, std::size_t bytes) {
  constexpr std::size_t kDefault = 48 << 10;
  if (bytes <= kDefault) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

}  // namespace icsd::cuda
