// Only a part of the block comes to the barrier.
#include "planted.h"

namespace divergent_barrier {

template <bool planted>
__global__ void shift(const float* x, float* out, unsigned n) {
  __shared__ float line[64];
  if (threadIdx.x < n) {
    line[threadIdx.x] = x[threadIdx.x];
    if (planted) __syncthreads();
  }
  if (!planted) __syncthreads();
  if (threadIdx.x < n) out[threadIdx.x] = line[n - 1 - threadIdx.x];
}

template <bool planted>
bool run() {
  Memory<float> x(48), out(48);
  launch(shift<planted>, 1, 64, 0, nullptr, x, out, 48);
  return out.sum() == x.sum();
}

}  // namespace divergent_barrier

PLANT(divergent_barrier)
