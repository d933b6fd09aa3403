// ldmatrix and mma of the PTX manual ("Warp-level matrix instructions"), lane by lane as it specifies them.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

namespace emulator {

// ldmatrix.m8n8.x4: lane 8 q + r gives the address of row r of matrix q. A lane gets a word of row lane / 4 or, if
// transposed, the elements (2 (lane % 4), lane / 4) and (2 (lane % 4) + 1, lane / 4).
inline void load_matrices(unsigned (&words)[4], const void* row, bool transpose, EMULATOR_SITE) {
  require_aligned(row, 16, "ldmatrix", site);
  if (!is_shared(row)) fail(site, "ldmatrix: the row is not in shared memory");
  struct Lane {
    std::uint16_t row[8];
    unsigned words[4];
    bool transpose;
  } lane;
  const auto* const elements = static_cast<const std::uint16_t*>(row);
  for (int k = 0; k < 8; ++k) lane.row[k] = elements[k];  // read by the lane that names it
  lane.transpose = transpose;
  warp_collective(
      "ldmatrix", 0xffffffff, &lane,
      [](void* const* lanes, unsigned) {
        const auto element = [&](int matrix, int i, int j) -> unsigned {
          return static_cast<const Lane*>(lanes[8 * matrix + i])->row[j];
        };
        for (int l = 0; l < 32; ++l) {
          Lane& to = *static_cast<Lane*>(lanes[l]);
          for (int q = 0; q < 4; ++q) {
            const int i = l / 4, j = 2 * (l % 4);
            const unsigned first = to.transpose ? element(q, j, i) : element(q, i, j);
            const unsigned second = to.transpose ? element(q, j + 1, i) : element(q, i, j + 1);
            to.words[q] = first | second << 16;
          }
        }
      },
      site);
  for (int q = 0; q < 4; ++q) words[q] = lane.words[q];
}

enum class MatrixKind { tf32, bfloat16, float16 };

// Returns the value of a word's element. Tensor cores ignore the low 13 bits of a float in the place of a tf32 number.
inline double matrix_element(MatrixKind kind, unsigned word, int element) {
  if (kind == MatrixKind::tf32) {
    word &= 0xffffe000;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  const auto bits = static_cast<std::uint16_t>(word >> 16 * element);
  if (kind == MatrixKind::bfloat16) {
    __nv_bfloat16 value;
    std::memcpy(&value, &bits, sizeof value);
    return __bfloat162float(value);
  }
  __half value;
  std::memcpy(&value, &bits, sizeof value);
  return __half2float(value);
}

// mma.m16n8k8 of tf32, mma.m16n8k16 of 16-bit types.
inline void multiply_tile(MatrixKind kind, float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                          EMULATOR_SITE) {
  struct Lane {
    MatrixKind kind;
    unsigned a[4], b[2];
    float c[4];
  } lane{kind, {a[0], a[1], a[2], a[3]}, {b0, b1}, {sums[0], sums[1], sums[2], sums[3]}};
  warp_collective(
      "mma", 0xffffffff, &lane,
      [](void* const* lanes, unsigned) {
        const MatrixKind kind = static_cast<const Lane*>(lanes[0])->kind;
        const int packed = kind == MatrixKind::tf32 ? 1 : 2, depth = 8 * packed;
        double a[16 * 16], b[16 * 8], c[16 * 8];
        for (int l = 0; l < 32; ++l) {
          const Lane& lane = *static_cast<const Lane*>(lanes[l]);
          const int group = l / 4, member = l % 4;  // as the manual calls them
          for (int i = 0; i < 4; ++i) {
            const int row = group + (i % 2 ? 8 : 0), k = packed * (member + (i < 2 ? 0 : 4));
            for (int e = 0; e < packed; ++e) a[row * depth + k + e] = matrix_element(kind, lane.a[i], e);
            c[(group + (i < 2 ? 0 : 8)) * 8 + 2 * member + i % 2] = lane.c[i];
          }
          for (int i = 0; i < 2; ++i) {
            for (int e = 0; e < packed; ++e) {
              b[(packed * (member + 4 * i) + e) * 8 + group] = matrix_element(kind, lane.b[i], e);
            }
          }
        }
        tile_product(a, b, c, 16, 8, depth, 4 * packed);
        for (int l = 0; l < 32; ++l) {
          for (int i = 0; i < 4; ++i) {
            const double sum = c[(l / 4 + (i < 2 ? 0 : 8)) * 8 + 2 * (l % 4) + i % 2];
            static_cast<Lane*>(lanes[l])->c[i] = static_cast<float>(sum);
          }
        }
      },
      site);
  for (int i = 0; i < 4; ++i) sums[i] = lane.c[i];
}

// mma.m8n8k4 of float64, by fused multiply-adds.
inline void multiply_tile(double (&sums)[2], double a, double b, EMULATOR_SITE) {
  struct Lane {
    double a, b, c[2];
  } lane{a, b, {sums[0], sums[1]}};
  warp_collective(
      "mma", 0xffffffff, &lane,
      [](void* const* lanes, unsigned) {
        const auto of = [&](int l) { return static_cast<Lane*>(lanes[l]); };
        for (int l = 0; l < 32; ++l) {
          const int group = l / 4, member = l % 4;
          for (int i = 0; i < 2; ++i) {
            for (int k = 0; k < 4; ++k) {
              of(l)->c[i] = std::fma(of(4 * group + k)->a, of(4 * (2 * member + i) + k)->b, of(l)->c[i]);
            }
          }
        }
      },
      site);
  for (int i = 0; i < 2; ++i) sums[i] = lane.c[i];
}

}  // namespace emulator
