// A full mask in a shuffle after some lanes returned.
#include "planted.h"

namespace exited_lanes_in_mask {

template <bool planted>
__global__ void sum(const float* x, float* out, unsigned n) {
  if (planted && threadIdx.x >= n) return;
  float value = threadIdx.x < n ? x[threadIdx.x] : 0;
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  if (threadIdx.x == 0) *out = value;
}

template <bool planted>
bool run() {
  Memory<float> x(20), out(1);
  launch(sum<planted>, 1, 32, 0, nullptr, x, out, 20);
  return out[0] == x.sum();
}

}  // namespace exited_lanes_in_mask

PLANT(exited_lanes_in_mask)
