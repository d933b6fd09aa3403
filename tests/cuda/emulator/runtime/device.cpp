// The host's side: launches, memory, streams, and what the tests set and ask for.

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <thread>
#include <utility>

#include "cuda_runtime_api.h"
#include "multiprocessor.h"
#include "static_shared.h"

struct CUstream_st {};
struct CUevent_st {
  std::chrono::steady_clock::time_point time;
};

extern "C" __attribute__((weak)) void emulator_launch_ended();  // meter.cpp's, where it is there

namespace emulator {
namespace {

struct Launched {
  const void* kernel;
  unsigned threads;    // of a block
  std::size_t shared;  // dynamic, of a block
  bool early;          // before the previous kernel has finished
};

constexpr int kMaxThreads = 1024;
constexpr int kSharedByDefault = 48 << 10;
constexpr std::size_t kConcurrentBlocks = 64;

struct Device {
  std::mutex mutex;
  std::uint64_t seed = 0;
  bool concurrent_blocks = false;
  int multiprocessors = 4;
  int capability = __CUDA_ARCH__ / 10;
  int driver = 13000;
  bool dry = false;        // launches are checked, but nothing runs
  bool capturing = false;  // as if a graph was captured
  cudaStream_t stream{};   // the only one that launches may be on, unless null
  std::vector<Launched> launches;
  std::map<const void*, int> shared_limits;
  std::uint64_t attributes_set = 0;
  cudaError_t failed = cudaSuccess;
  std::string failure;  // describes `failed`
  Multiprocessor in_turn;
  // One for each block of those that run at once. They outlive the launch, since stacks for all the threads of a block
  // take longer to make than most blocks take to run.
  std::vector<std::unique_ptr<Multiprocessor>> at_once;
};

Device& device() {
  static Device device;
  return device;
}

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t refuse(cudaError_t error, const std::string& why) {
  device().failed = error;
  device().failure = why;
  return result(error);
}

// Fails while a graph is captured: for functions that wait, or that a graph cannot repeat.
cudaError_t check_capture(const char* function) {
  if (!device().capturing) return cudaSuccess;
  return refuse(cudaErrorStreamCaptureUnsupported, std::string(function) + " is not allowed while a graph is captured");
}

cudaError_t check_stream(cudaStream_t stream) {
  const auto number = [](cudaStream_t of) { return std::to_string(reinterpret_cast<std::uintptr_t>(of)); };
  if (device().capturing && !stream) {
    return refuse(cudaErrorStreamCaptureImplicit, "the default stream is used while a graph is captured");
  }
  if (!device().stream || stream == device().stream) return cudaSuccess;
  return refuse(cudaErrorInvalidResourceHandle,
                "stream " + number(stream) + " is used, the current one is " + number(device().stream));
}

Dl_info where(std::uint64_t launch) {
  Dl_info info{};
  dladdr(device().launches[launch].kernel, &info);
  return info;
}

int shared_opt_in() {
  const int capability = device().capability;
  const int kib = capability >= 120 ? 99 : capability >= 90 ? 227 : capability > 80 ? 99 : capability == 80 ? 163 : 64;
  return kib << 10;
}

// Returns how much dynamic shared memory a launch may ask for. Without an attribute set, the default includes static
// shared memory.
std::size_t most_dynamic(const void* kernel, std::size_t fixed) {
  const auto limit = device().shared_limits.find(kernel);
  return limit == device().shared_limits.end() ? kSharedByDefault - fixed : limit->second;
}

void run(Launch& launch) {
  std::vector<uint3> blocks;
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; ++x) blocks.push_back({x, y, z});
    }
  }
  if (launch.seed) std::shuffle(blocks.begin(), blocks.end(), std::minstd_rand(launch.seed));
  if (!launch.concurrent) {
    for (std::size_t i = 0; i < blocks.size() && !launch.failed; ++i) device().in_turn.run(launch, blocks[i]);
    return;
  }
  auto& at_once = device().at_once;
  while (at_once.size() < kConcurrentBlocks) at_once.push_back(std::make_unique<Multiprocessor>());
  for (std::size_t begin = 0; begin < blocks.size(); begin += kConcurrentBlocks) {
    std::vector<std::thread> threads;
    for (std::size_t i = begin; i < std::min(begin + kConcurrentBlocks, blocks.size()); ++i) {
      threads.emplace_back([&launch, block = blocks[i], &on = *at_once[i - begin]] { on.run(launch, block); });
    }
    for (auto& thread : threads) thread.join();
  }
}

}  // namespace

cudaError_t start(const void* kernel, const std::function<void()>& body, const cudaLaunchConfig_t& config) {
  const dim3 &grid = config.grid, &block = config.block;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 ||
      grid.y > 0xffff || grid.z == 0 || grid.z > 0xffff) {
    return result(cudaErrorInvalidConfiguration);
  }
  const std::lock_guard lock(device().mutex);
  if (const cudaError_t error = check_stream(config.stream)) return error;
  const std::size_t fixed = static_shared(kernel), most = most_dynamic(kernel, fixed);
  if (config.dynamicSmemBytes > most) {
    return refuse(cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) +
                                             " bytes of dynamic shared memory beside " + std::to_string(fixed) +
                                             " static ones, but at most " + std::to_string(most));
  }
  const bool early = config.numAttrs != 0;
  device().launches.push_back({kernel, static_cast<unsigned>(threads), config.dynamicSmemBytes, early});
  Launch launch{kernel, body, grid, block, config.dynamicSmemBytes, device().seed, device().concurrent_blocks, early};
  if (!device().dry) run(launch);
  if (emulator_launch_ended) emulator_launch_ended();
  return launch.failed ? refuse(cudaErrorLaunchFailure, launch.failure) : cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(device().mutex);
  ++device().attributes_set;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value + static_shared(kernel) > std::size_t(shared_opt_in())) return result(cudaErrorInvalidValue);
  device().shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t get_attributes(const void* kernel, cudaFuncAttributes* attributes) {
  const std::lock_guard lock(device().mutex);
  const std::size_t fixed = static_shared(kernel);
  *attributes = {fixed, static_cast<int>(most_dynamic(kernel, fixed))};
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, int threads, std::size_t shared) {
  *blocks = std::min<int>(2048 / threads, shared ? shared_opt_in() / shared : 32);
  return cudaSuccess;
}

extern "C" {

// The schedule: 0 runs warps and lanes in order, any other number is another hostile order.
void emulator_seed(std::uint64_t seed) { device().seed = seed; }
// Decides whether each block has an OS thread of its own, for races between blocks.
void emulator_concurrent_blocks(int yes) { device().concurrent_blocks = yes; }
void emulator_multiprocessors(int count) { device().multiprocessors = count; }
// The compute capability, such as 75: that of the build at first.
void emulator_capability(int capability) { device().capability = capability; }
// The version of CUDA that the driver is made for; 0 for no driver.
void emulator_driver(int version) { device().driver = version; }
// Decides whether launches are only checked and counted.
void emulator_dry_run(int yes) { device().dry = yes; }
// Decides whether calls are refused that must not be made while a graph is captured.
void emulator_capture(int yes) { device().capturing = yes; }
// The stream that every launch must be on; null for any.
void emulator_require_stream(void* stream) { device().stream = static_cast<cudaStream_t>(stream); }
// The number of times that an attribute of a kernel was set.
std::uint64_t emulator_attributes_set() { return device().attributes_set; }
std::uint64_t emulator_launches() { return device().launches.size(); }
// These describe a launch, counted from 0: where its kernel stands in which library, threads and dynamic shared memory
// of a block, and whether it was launched before the previous kernel had finished.
const char* emulator_launch_library(std::uint64_t launch) { return where(launch).dli_fname; }
std::uint64_t emulator_launch_offset(std::uint64_t launch) {
  return static_cast<const char*>(device().launches[launch].kernel) - static_cast<const char*>(where(launch).dli_fbase);
}
unsigned emulator_launch_threads(std::uint64_t launch) { return device().launches[launch].threads; }
std::uint64_t emulator_launch_shared(std::uint64_t launch) { return device().launches[launch].shared; }
int emulator_launch_early(std::uint64_t launch) { return device().launches[launch].early; }
// Describes the last launch that failed.
const char* emulator_failure() { return device().failure.c_str(); }
}

}  // namespace emulator

using emulator::check_capture;
using emulator::check_stream;
using emulator::result;

cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t) {
  *pointer = nullptr;
  if (!bytes) return cudaSuccess;
  if (posix_memalign(pointer, 256, bytes)) return result(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xff, bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  *pointer = nullptr;
  if (const cudaError_t error = check_capture("cudaMalloc")) return error;
  return cudaMallocAsync(pointer, bytes, nullptr);
}
cudaError_t cudaFree(void* pointer) {
  if (const cudaError_t error = check_capture("cudaFree")) return error;
  return cudaFreeAsync(pointer, nullptr);
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  if (const cudaError_t error = check_capture("cudaMemcpy")) return error;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream)) return error;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  if (const cudaError_t error = check_capture("cudaMemset")) return error;
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream)) return error;
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return check_capture("cudaStreamSynchronize"); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st{};
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return check_capture("cudaEventSynchronize"); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
  return cudaSuccess;
}

constexpr int kRuntime = 13000;

cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulator::device().driver >= kRuntime;
  return *count ? cudaSuccess : result(cudaErrorInsufficientDriver);
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : result(cudaErrorInvalidDevice); }

// There is no driver.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = nullptr;
  *found = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return check_capture("cudaDeviceSynchronize"); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = emulator::kMaxThreads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = emulator::kSharedByDefault; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = emulator::device().multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = 4 << 20; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2 * emulator::kMaxThreads; break;
    case cudaDevAttrComputeCapabilityMajor: *value = emulator::device().capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = emulator::device().capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::shared_opt_in(); break;
    default: return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kRuntime;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulator::device().driver;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return emulator::last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == emulator::device().failed ? emulator::emulator_failure() : cudaGetErrorName(error);
}
