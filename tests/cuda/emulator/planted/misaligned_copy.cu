// A 16-byte asynchronous copy from a pointer that is aligned to 4.
#include <cuda_pipeline.h>

#include "planted.h"

namespace misaligned_copy {

template <bool planted>
__global__ void copy(const float* x, float* out) {
  __shared__ float4 line[32];
  if (planted) {
    __pipeline_memcpy_async(&line[threadIdx.x], x + 4 * threadIdx.x + 1, 16);
  } else {
    for (int i = 0; i < 4; ++i) __pipeline_memcpy_async(&line[threadIdx.x].x + i, x + 4 * threadIdx.x + 1 + i, 4);
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
  *reinterpret_cast<float4*>(out + 4 * threadIdx.x) = line[threadIdx.x];
}

template <bool planted>
bool run() {
  Memory<float> x(129), out(128);
  launch(copy<planted>, 1, 32, 0, nullptr, x, out);
  return out.sum() == x.sum();
}

}  // namespace misaligned_copy

PLANT(misaligned_copy)
