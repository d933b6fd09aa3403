// Writes one element behind a static shared array.
#include "planted.h"

namespace static_shared_overrun {

template <bool planted>
__global__ void shift(const float* x, float* out) {
  __shared__ float line[64];
  line[threadIdx.x + (planted ? 1 : 0)] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = line[63 - threadIdx.x];
}

template <bool planted>
bool run() {
  Memory<float> x(64), out(64);
  launch(shift<planted>, 1, 64, 0, nullptr, x, out);
  return out.sum() == x.sum();
}

}  // namespace static_shared_overrun

PLANT(static_shared_overrun)
