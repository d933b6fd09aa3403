// The last tile of a row is loaded whole though the row ends within it.
#include "planted.h"

namespace tile_past_a_row {

template <bool planted>
__global__ void row_sums(const float* x, float* out, unsigned columns) {
  float sum = 0;
  for (unsigned begin = 0; begin < columns; begin += 32) {
    const unsigned column = begin + threadIdx.x;
    const float value = planted || column < columns ? x[blockIdx.x * columns + column] : 0;
    sum += column < columns ? value : 0;
  }
  for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffff, sum, step);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <bool planted>
bool run() {
  Memory<float> x(3 * 50), out(3);
  launch(row_sums<planted>, 3, 32, 0, nullptr, x, out, 50);
  return out.sum() == x.sum();
}

}  // namespace tile_past_a_row

PLANT(tile_past_a_row)
