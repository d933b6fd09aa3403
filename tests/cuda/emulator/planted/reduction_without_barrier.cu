// The second half of a tree reduction reads what the first may not have written.
#include "planted.h"

namespace reduction_without_barrier {

template <bool planted>
__global__ void sum(const float* x, float* out) {
  __shared__ float part[128];
  part[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  for (unsigned half = 64; half; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    if (!planted || half > 64) __syncthreads();
  }
  if (threadIdx.x == 0) *out = part[0];
}

template <bool planted>
bool run() {
  Memory<float> x(128), out(1);
  launch(sum<planted>, 1, 128, 0, nullptr, x, out);
  return out[0] == x.sum();
}

}  // namespace reduction_without_barrier

PLANT(reduction_without_barrier)
