// The next tile overwrites one that another warp still reads.
#include "planted.h"

namespace tile_loop_without_trailing_barrier {

template <bool planted>
__global__ void sum_of_all(const float* x, float* out, int tiles) {
  __shared__ float tile[64];
  float sum = 0;
  for (int t = 0; t < tiles; ++t) {
    tile[threadIdx.x] = x[t * 64 + threadIdx.x];
    __syncthreads();
    for (float value : tile) sum += value;
    if (!planted) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool planted>
bool run() {
  Memory<float> x(512), out(64);
  launch(sum_of_all<planted>, 1, 64, 0, nullptr, x, out, 8);
  return out.sum() == 64 * x.sum();
}

}  // namespace tile_loop_without_trailing_barrier

PLANT(tile_loop_without_trailing_barrier)
