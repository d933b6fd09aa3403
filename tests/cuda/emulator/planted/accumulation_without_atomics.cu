// Two blocks add to one address.
#include "planted.h"

namespace accumulation_without_atomics {

template <bool planted>
__global__ void sum(const float* x, float* out) {
  const float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (planted) {
    out[threadIdx.x] += value;
  } else {
    atomicAdd(&out[threadIdx.x], value);
  }
}

template <bool planted>
bool run() {
  Memory<float> x(128), out(32);
  cudaMemset(out, 0, 32 * sizeof(float));
  launch(sum<planted>, 4, 32, 0, nullptr, x, out);
  return out.sum() == x.sum();
}

}  // namespace accumulation_without_atomics

PLANT(accumulation_without_atomics)
