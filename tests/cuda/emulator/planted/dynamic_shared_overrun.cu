// Writes one element behind the dynamic shared memory.
#include "planted.h"

namespace dynamic_shared_overrun {

template <bool planted>
__global__ void shift(const float* x, float* out) {
  ICSD_DYNAMIC_SHARED(float, line);
  line[threadIdx.x + (planted ? 1 : 0)] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = line[63 - threadIdx.x];
}

template <bool planted>
bool run() {
  Memory<float> x(64), out(64);
  launch(shift<planted>, 1, 64, 64 * sizeof(float), nullptr, x, out);
  return out.sum() == x.sum();
}

}  // namespace dynamic_shared_overrun

PLANT(dynamic_shared_overrun)
