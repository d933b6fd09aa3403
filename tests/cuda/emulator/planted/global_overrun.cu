// Writes one element behind the output.
#include "planted.h"

namespace global_overrun {

template <bool planted>
__global__ void copy(const float* x, float* out, unsigned n) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (planted ? i <= n : i < n) out[i] = i < n ? x[i] : 0;
}

template <bool planted>
bool run() {
  Memory<float> x(100), out(100);
  launch(copy<planted>, 4, 32, 0, nullptr, x, out, 100);
  return out.sum() == x.sum();
}

}  // namespace global_overrun

PLANT(global_overrun)
