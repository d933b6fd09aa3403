// Counts on shared memory to start at zero.
#include "planted.h"

namespace uninitialized_shared {

template <bool planted>
__global__ void sum(const float* x, float* out) {
  __shared__ float total;
  if (!planted && threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, x[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) *out = total;
}

template <bool planted>
bool run() {
  Memory<float> x(64), out(1);
  launch(sum<planted>, 1, 64, 0, nullptr, x, out);
  return out[0] == x.sum();
}

}  // namespace uninitialized_shared

PLANT(uninitialized_shared)
