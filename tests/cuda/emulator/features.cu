// Small kernels, each for something that CUDA promises and the emulator must keep.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include "cuda/runtime/launch.cuh"
#include "cuda/runtime/matrix_instructions.cuh"

using icsd::cuda::launch;

namespace {

__global__ void round_to(const float* x, float* half, float* bfloat16, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    half[i] = __half2float(__float2half(x[i]));
    bfloat16[i] = __bfloat162float(__float2bfloat16(x[i]));
  }
}

// d = a b + c, given the words of each lane. The type of the product is that of `kind`.
template <class Kind>
__global__ void product(const unsigned* a, const unsigned* b, const float* c, float* d) {
  const unsigned lane = threadIdx.x;
  unsigned left[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = a[lane * 4 + i];
    sums[i] = c[lane * 4 + i];
  }
  icsd::cuda::multiply_tile(Kind{}, sums, left, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

__global__ void product_in_float64(const double* a, const double* b, const double* c, double* d) {
  const unsigned lane = threadIdx.x;
  double sums[2] = {c[2 * lane], c[2 * lane + 1]};
  icsd::cuda::multiply_tile(sums, a[lane], b[lane]);
  for (int i = 0; i < 2; ++i) d[2 * lane + i] = sums[i];
}

// The words that each lane loads of 32 rows of 16 bytes.
template <bool kTranspose>
__global__ void matrices(const uint4* rows, unsigned* words) {
  __shared__ uint4 shared[32];
  shared[31 - threadIdx.x] = rows[threadIdx.x];
  __syncthreads();
  unsigned own[4];
  icsd::cuda::load_matrices<kTranspose>(own, shared + 31 - threadIdx.x);
  for (int i = 0; i < 4; ++i) words[threadIdx.x * 4 + i] = own[i];
}

constexpr unsigned kAll = 0xffffffff;

__global__ void warp(const int* x, int* out) {
  const int lane = threadIdx.x % 32, value = x[threadIdx.x];
  int* to = out + threadIdx.x;
  const auto write = [&](int result) {
    *to = result;
    to += blockDim.x;
  };
  write(__shfl_sync(kAll, value, 5));
  write(__shfl_sync(kAll, value, lane + 1, 8));
  write(__shfl_up_sync(kAll, value, 3));
  write(__shfl_down_sync(kAll, value, 3, 16));
  write(__shfl_xor_sync(kAll, value, 9));
  write(__popc(__ballot_sync(kAll, value % 3 == 0)));
  write(__any_sync(kAll, value == 40));
  write(__all_sync(kAll, value < 90));
  write(__reduce_add_sync(kAll, value));
  write(__reduce_max_sync(kAll, value));
  write(__reduce_min_sync(kAll, value));
  // The halves of the warp go separate ways.
  const unsigned half = lane < 16 ? 0x0000ffff : 0xffff0000;
  write(lane < 16 ? __reduce_add_sync(half, value) : __reduce_max_sync(half, value));
  write(__syncthreads_count(value % 2));
  write(__syncthreads_or(value == 40));
  write(__syncthreads_and(value < 90));
}

__global__ void atomics(float* sum, int* largest, unsigned* turns, int* order) {
  atomicAdd(sum, 0.5f);
  atomicMax(largest, int(threadIdx.x * 7 % 31));
  atomicInc(turns, 9);
  if (threadIdx.x == 0) order[atomicAdd(order + gridDim.x, 1)] = blockIdx.x;
}

// Copies rows, the first half of each by way of shared memory.
__global__ void move_rows(const float* x, float* out, int columns) {
  ICSD_DYNAMIC_SHARED(float4, row);
  const auto* from = reinterpret_cast<const float4*>(x + blockIdx.x * columns);
  auto* to = reinterpret_cast<float4*>(out + blockIdx.x * columns);
  const int half = columns / 8;
  for (int i = threadIdx.x; i < half; i += blockDim.x) __pipeline_memcpy_async(&row[i], &from[i], 16);
  __pipeline_commit();
  for (int i = half + threadIdx.x; i < 2 * half; i += blockDim.x) __stcs(&to[i], __ldcs(&from[i]));
  __pipeline_wait_prior(0);
  for (int i = threadIdx.x; i < half; i += blockDim.x) to[i] = row[i];
}

__global__ void zero_filled(const float* x, float* out) {
  __shared__ float4 line;
  __pipeline_memcpy_async(&line, x, 16, 10);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  *reinterpret_cast<float4*>(out) = line;
}

__global__ void nothing() {}

// Has 16 KiB of static shared memory and 4 more bytes, which take 16.
__global__ void static_shared(float* out) {
  __shared__ float values[4096];
  __shared__ int count;
  values[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == 0) count = blockDim.x;
  __syncthreads();
  if (out) out[threadIdx.x] = values[count - 1 - threadIdx.x];
}

}  // namespace

extern "C" {

void emulate_round_to(const float* x, float* half, float* bfloat16, int n) {
  launch(round_to, 1, 64, 0, nullptr, x, half, bfloat16, n);
}
void emulate_product_bfloat16(const unsigned* a, const unsigned* b, const float* c, float* d) {
  launch(product<__nv_bfloat16>, 1, 32, 0, nullptr, a, b, c, d);
}
void emulate_product_float16(const unsigned* a, const unsigned* b, const float* c, float* d) {
  launch(product<__half>, 1, 32, 0, nullptr, a, b, c, d);
}
void emulate_product_float64(const double* a, const double* b, const double* c, double* d) {
  launch(product_in_float64, 1, 32, 0, nullptr, a, b, c, d);
}
void emulate_product_tf32(const unsigned* a, const unsigned* b, const float* c, float* d) {
  launch(product<icsd::cuda::Tf32>, 1, 32, 0, nullptr, a, b, c, d);
}
void emulate_matrices(const uint4* rows, unsigned* words, int transposed) {
  launch(transposed ? matrices<true> : matrices<false>, 1, 32, 0, nullptr, rows, words);
}
void emulate_warp(const int* x, int* out) { launch(warp, 1, 64, 0, nullptr, x, out); }
void emulate_atomics(float* sum, int* largest, unsigned* turns, int* order, int blocks) {
  launch(atomics, blocks, 32, 0, nullptr, sum, largest, turns, order);
}
void emulate_move_rows(const float* x, float* out, int rows, int columns) {
  launch(move_rows, rows, 32, columns * 2, nullptr, x, out, columns);
}
void emulate_zero_filled(const float* x, float* out) { launch(zero_filled, 1, 1, 0, nullptr, x, out); }
int emulate_launch(int blocks, int threads, int shared, int allowed) {
  if (allowed >= 0) {
    const cudaError_t refused = cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    if (refused != cudaSuccess) return refused;
  }
  const cudaLaunchConfig_t config = {blocks, threads, std::size_t(shared), nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, nothing);
}
// Launches a kernel with static shared memory after `allowed` bytes of dynamic shared memory were allowed, unless
// negative.
int emulate_static_shared(int shared, int allowed, cudaStream_t stream) {
  if (allowed >= 0) {
    const cudaError_t refused =
        cudaFuncSetAttribute(static_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    if (refused != cudaSuccess) return refused;
  }
  const cudaLaunchConfig_t config = {1, 32, std::size_t(shared), stream, nullptr, 0};
  return cudaLaunchKernelEx(&config, static_shared, nullptr);
}
int emulate_static_shared_bytes() {
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, static_shared);
  return static_cast<int>(attributes.sharedSizeBytes);
}
// Calls the functions that may not be called while a graph is captured; returns how many of them were refused.
int emulate_waits() {
  void* memory = nullptr;
  cudaEvent_t event;
  cudaEventCreate(&event);
  int refused = 0;
  for (const cudaError_t error :
       {cudaMalloc(&memory, 8), cudaFree(memory), cudaDeviceSynchronize(), cudaEventSynchronize(event),
        cudaStreamSynchronize(nullptr), cudaMemcpy(&memory, &memory, 8, cudaMemcpyDefault)}) {
    refused += error == cudaErrorStreamCaptureUnsupported;
  }
  cudaEventDestroy(event);
  return refused;
}
int emulate_attribute(int attribute) {
  int value = -1;
  cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(attribute), 0);
  return value;
}
}
