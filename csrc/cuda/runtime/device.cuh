// Properties and limits of the current device.
#pragma once

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "cuda/runtime/launch.cuh"

namespace icsd::cuda {

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

inline int attribute(cudaDeviceAttr name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, current_device()));
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

// Returns how many bytes of dynamic shared memory a launch of `kernel` may have on the current device: what a block can
// have at most, less the kernel's static shared memory. The first call for a kernel and device sets this limit.
template <class Kernel>
std::size_t dynamic_shared_limit(Kernel* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, Kernel*>, std::size_t> limits;
  const std::pair key{current_device(), kernel};
  const std::lock_guard lock(mutex);
  if (const auto known = limits.find(key); known != limits.end()) return known->second;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  return limits[key] = limit;
}

// Allows launches of `kernel` with `bytes` of dynamic shared memory; throws if the device has less.
template <class Kernel>
void allow_shared(Kernel* kernel, std::size_t bytes) {
  const std::size_t limit = dynamic_shared_limit(kernel);
  if (bytes > limit) {
    throw std::invalid_argument("icsd: a block needs " + std::to_string(bytes) +
                                " bytes of shared memory, this device has " + std::to_string(limit) +
                                "; use fewer samples, or the regime streamed");
  }
}

// Returns true if `kernel` waits for the previous one: if it was compiled for compute capability 9.0 or later. On newer
// devices, too, drivers may run what was compiled for older ones.
template <class Kernel>
bool waits_for_previous(Kernel* kernel) {
#ifdef ICSD_EMULATED
  return true;
#else
  static std::mutex mutex;
  static std::map<std::pair<int, Kernel*>, bool> known;
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = known.try_emplace({current_device(), kernel}, false);
  if (is_new) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel));
    place->second = attributes.ptxVersion >= 90;
  }
  return place->second;
#endif
}

// Launches a kernel that begins with `wait_for_previous`, where that is possible before the previous kernel has
// finished: its blocks then start while that one ends ("programmatic dependent launch").
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
                  Arguments&&... arguments) {
  launch_kernel(waits_for_previous(kernel), kernel, grid, block, shared, stream,
                static_cast<Arguments&&>(arguments)...);
}

// Returns how many blocks of `kernel` a multiprocessor of the current device holds at once.
template <class Kernel>
int resident_blocks(Kernel* kernel, int threads, std::size_t shared) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel*, int, std::size_t>, int> known;
  allow_shared(kernel, shared);
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = known.try_emplace({current_device(), kernel, threads, shared}, 0);
  if (is_new) check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&place->second, kernel, threads, shared));
  return place->second;
}

}  // namespace icsd::cuda
