// A tensor core tile at a pointer that is aligned to 16 bytes only.
#include <mma.h>

#include "planted.h"

namespace misaligned_tile {

template <bool planted>
__global__ void transpose(const __nv_bfloat16* x, float* out) {
  namespace wmma = nvcuda::wmma;
  __shared__ __align__(32) __nv_bfloat16 tile[16][24];
  __shared__ __align__(32) __nv_bfloat16 identity[16][16];
  constexpr int shift = planted ? 8 : 0;
  for (unsigned i = threadIdx.x; i < 256; i += 32) {
    tile[i / 16][i % 16 + shift] = x[i];
    identity[i / 16][i % 16] = i / 16 == i % 16 ? 1.0f : 0.0f;
  }
  __syncwarp();
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::col_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::row_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> c;
  wmma::load_matrix_sync(a, &tile[0][shift], 24);
  wmma::load_matrix_sync(b, &identity[0][0], 16);
  wmma::fill_fragment(c, 0.0f);
  wmma::mma_sync(c, a, b, c);
  wmma::store_matrix_sync(out, c, 16, wmma::mem_row_major);
}

template <bool planted>
bool run() {
  Memory<__nv_bfloat16> x(256);
  Memory<float> out(256);
  launch(transpose<planted>, 1, 32, 0, nullptr, x, out);
  for (int i = 0; i < 256; ++i) {
    if (out[i] != float(x[i % 16 * 16 + i / 16])) return false;
  }
  return true;
}

}  // namespace misaligned_tile

PLANT(misaligned_tile)
