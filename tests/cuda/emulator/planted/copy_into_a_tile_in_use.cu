// An asynchronous copy starts into the stage that another warp still reads.
#include <cuda_pipeline.h>

#include "planted.h"

namespace copy_into_a_tile_in_use {

template <bool planted>
__global__ void sum_of_all(const float* x, float* out, int tiles) {
  __shared__ float stages[2][64];
  const auto fetch = [&](int tile) {
    if (tile < tiles) __pipeline_memcpy_async(&stages[tile % 2][threadIdx.x], &x[tile * 64 + threadIdx.x], 4);
    __pipeline_commit();
  };
  float sum = 0;
  fetch(0);
  for (int t = 0; t < tiles; ++t) {
    if (planted) fetch(t + 1);
    __pipeline_wait_prior(planted ? 1 : 0);
    __syncthreads();
    if (!planted) fetch(t + 1);
    for (float value : stages[t % 2]) sum += value;
  }
  out[threadIdx.x] = sum;
}

template <bool planted>
bool run() {
  Memory<float> x(512), out(64);
  launch(sum_of_all<planted>, 1, 64, 0, nullptr, x, out, 8);
  return out.sum() == 64 * x.sum();
}

}  // namespace copy_into_a_tile_in_use

PLANT(copy_into_a_tile_in_use)
