// A matrix for the tensor cores with a row that is aligned to 8 bytes only.
#include "cuda/runtime/matrix_instructions.cuh"
#include "planted.h"

namespace misaligned_tile {

template <bool planted>
__global__ void transpose(const __nv_bfloat16* x, float* out) {
  __shared__ __align__(16) __nv_bfloat16 tile[32][16];
  constexpr int shift = planted ? 4 : 0;
  for (unsigned i = 0; i < 8; ++i) tile[threadIdx.x][i + shift] = x[threadIdx.x * 8 + i];
  __syncwarp();
  unsigned words[4];
  icsd::cuda::load_matrices<true>(words, &tile[threadIdx.x][shift]);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    for (unsigned i = 0; i < 2; ++i) {
      const auto bits = static_cast<unsigned short>(words[matrix] >> 16 * i);
      out[matrix * 64 + threadIdx.x / 4 * 8 + threadIdx.x % 4 * 2 + i] =
          __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(&bits));
    }
  }
}

template <bool planted>
bool run() {
  Memory<__nv_bfloat16> x(256);
  Memory<float> out(256);
  launch(transpose<planted>, 1, 32, 0, nullptr, x, out);
  for (int i = 0; i < 256; ++i) {
    if (out[i] != float(x[i / 64 * 64 + i % 8 * 8 + i % 64 / 8])) return false;
  }
  return true;
}

}  // namespace misaligned_tile

PLANT(misaligned_tile)
