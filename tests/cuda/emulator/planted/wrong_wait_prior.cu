// Waits for all but one batch too many.
#include <cuda_pipeline.h>

#include "planted.h"

namespace wrong_wait_prior {

template <bool planted>
__global__ void copy(const float4* x, float4* out, int tiles) {
  __shared__ float4 stages[2][32];
  const auto fetch = [&](int tile) {
    if (tile < tiles) __pipeline_memcpy_async(&stages[tile % 2][threadIdx.x], &x[tile * 32 + threadIdx.x], 16);
    __pipeline_commit();
  };
  fetch(0);
  for (int t = 0; t < tiles; ++t) {
    fetch(t + 1);
    __pipeline_wait_prior(planted ? 2 : 1);
    out[t * 32 + threadIdx.x] = stages[t % 2][threadIdx.x];
  }
}

template <bool planted>
bool run() {
  Memory<float> x(512), out(512);
  launch(copy<planted>, 1, 32, 0, nullptr, reinterpret_cast<float4*>(+x), reinterpret_cast<float4*>(+out), 4);
  return out.sum() == x.sum();
}

}  // namespace wrong_wait_prior

PLANT(wrong_wait_prior)
