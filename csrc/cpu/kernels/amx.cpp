// The kernels for bfloat16 features in tile registers (AMX). Each instruction updates 16 x 16 sums by 32 products each.
//
// The left operand of such a product is 16 rows of 32 numbers, as in memory. The right one is 16 rows of 16 pairs: two
// terms of the sum for each column.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/narrow.h"
#include "cpu/kernels/panel.h"
#include "cpu/runtime/simd.h"

namespace icsd::cpu::ICSD_ISA {
namespace {

constexpr int64_t kTile = 16;   // rows of a tile, and sums across
constexpr int64_t kTerms = 32;  // of a sum in a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kMostTerms =
    512;                         // summed in float32; with more, the error would show for samples that are much alike
constexpr int64_t kVectors = 4;  // of features that `combine` takes at a time

// Configures the tile registers of this thread, each as 16 rows of 64 bytes.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    _tile_loadconfig(&layout);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

// GCC does not know that tile loads read memory: stores must be finished before them.
void finish_stores() { __asm__ volatile("" ::: "memory"); }

// Computes kRows x kColumns tiles of sums, kTile^2 sums each, from `count` tiles of terms; the tiles of an operand's
// row or column follow `a_next` or `b_next` bytes after each other, the rows and columns `a_stride` and `b_stride`.
template <int kRows, int kColumns>
void multiply_tiles(const char* a, int64_t a_stride, int64_t a_next, int64_t a_pitch, const char* b, int64_t b_stride,
                    int64_t b_next, int64_t b_pitch, int64_t count, float (*sums)[kTile * kTile]) {
  _tile_zero(0);
  if constexpr (kColumns > 1) _tile_zero(1);
  if constexpr (kRows > 1) _tile_zero(2);
  if constexpr (kRows > 1 && kColumns > 1) _tile_zero(3);
  for (int64_t k = 0; k < count; ++k, a += a_next, b += b_next) {
    _tile_loadd(4, a, a_pitch);
    _tile_loadd(6, b, b_pitch);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns > 1) {
      _tile_loadd(7, b + b_stride, b_pitch);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows > 1) {
      _tile_loadd(5, a + a_stride, a_pitch);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
  }
  constexpr int64_t kPitch = kTile * sizeof(float);
  _tile_stored(0, sums[0], kPitch);
  if constexpr (kColumns > 1) _tile_stored(1, sums[1], kPitch);
  if constexpr (kRows > 1) _tile_stored(2, sums[2], kPitch);
  if constexpr (kRows > 1 && kColumns > 1) _tile_stored(3, sums[3], kPitch);
}

using Multiply = void (*)(const char*, int64_t, int64_t, int64_t, const char*, int64_t, int64_t, int64_t, int64_t,
                          float (*)[kTile * kTile]);
Multiply multiply_of(int64_t rows, int64_t columns) {
  if (rows > 1) return columns > 1 ? multiply_tiles<2, 2> : multiply_tiles<2, 1>;
  return columns > 1 ? multiply_tiles<1, 2> : multiply_tiles<1, 1>;
}

int64_t tiles_of(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

// Lays out at most kTile samples as tiles of a left and a right operand, each of which may be null.
void lay_out(const bfloat16* x, int64_t stride, int64_t samples, int64_t dim, char* left, char* right) {
  for (int64_t k = 0; k < dim; k += kTerms) {
    const int64_t count = std::min(kTerms, dim - k);
    FloatVector rows[kTile] = {};
    for (int64_t i = 0; i < samples; ++i) {
      const bfloat16* from = x + i * stride + k;
      rows[i] = reinterpret_cast<FloatVector>(count == kTerms ? load_as<bfloat16>(from)
                                                              : load_partial<bfloat16>(from, count));
    }
    if (left) left = static_cast<char*>(std::memcpy(left, rows, sizeof rows)) + kTileBytes;
    if (right) {
      transpose_lanes(rows);
      right = static_cast<char*>(std::memcpy(right, rows, sizeof rows)) + kTileBytes;
    }
  }
}

// Adds the rows and columns of a tile that are within the matrix.
void add_tile(const float* sums, int64_t rows, int64_t columns, double* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) out[r * out_stride + c] += sums[r * kTile + c];
  }
}

int64_t bytes(int64_t samples) { return tiles_of(samples, kTile) * tiles_of(samples, kTerms) * kTileBytes; }

// Packs the matrix as tiles, one row of tiles after the other.
bool pack(const float* matrix, int64_t row_stride, int64_t samples, void* packed, float* rest) {
  auto* to = static_cast<bfloat16*>(packed);
  std::memset(packed, 0, bytes(samples));
  for (int64_t i = 0; i < samples; ++i) {
    for (int64_t j = 0; j < samples; ++j) {
      const float value = matrix[i * row_stride + j];
      const bfloat16 narrow = to_bfloat16(value);
      if (i == j) {
        rest[i] = value - to_float(narrow);
      } else if (to_float(narrow) != value) {
        return false;
      }
      const int64_t tile = i / kTile * tiles_of(samples, kTerms) + j / kTerms;
      to[(tile * kTile + i % kTile) * kTerms + j % kTerms] = narrow;
    }
  }
  return true;
}

void combine_tiles(const void* packed, const float* rest, const double* scale, const bfloat16* x, int64_t stride,
                   int64_t samples, int64_t dim, bfloat16* out, int64_t out_stride, const Ahead&) {
  constexpr int64_t kLanes = kTile, kWidth = kLanes * kVectors, kPitch = kVectors * 64;
  const TileRegisters registers;
  const int64_t terms = tiles_of(samples, kTerms), outputs = tiles_of(samples, kTile);
  const auto* matrix = static_cast<const char*>(packed);
  auto* const rows = reinterpret_cast<Bfloat16Vector*>(panel<bfloat16>(0, terms * kTerms * kWidth));
  std::fill_n(rows, terms * kTile * kVectors, Bfloat16Vector{});
  alignas(64) float sums[4][kTile * kTile];
  for (int64_t k = 0; k < dim; k += kWidth) {
    const int64_t count = std::min(kWidth, dim - k);
    Prefetch ahead(x + k + kWidth, stride * sizeof(bfloat16), k + kWidth < dim ? samples : 0,
                   std::min(kWidth, dim - k - kWidth) * sizeof(bfloat16), (outputs + 1) / 2);
    interleave_pairs(x + k, stride, samples, count, kVectors, rows);
    finish_stores();
    for (int64_t top = 0; top < outputs; top += 2, ahead.step()) {
      const int64_t height = std::min<int64_t>(2, outputs - top);
      for (int64_t left = 0; left < kVectors; left += 2) {
        multiply_of(height, 2)(matrix + top * terms * kTileBytes, terms * kTileBytes, kTileBytes, 64,
                               reinterpret_cast<const char*>(rows + left), 64, kTile * kPitch, kPitch, terms, sums);
        for (int64_t i = top * kTile; i < std::min(samples, (top + height) * kTile); ++i) {
          for (int64_t v = left; v < left + 2; ++v) {
            const FloatVector sum = load(sums[(i / kTile - top) * 2 + v - left] + i % kTile * kTile);
            const int64_t first = k + v * kLanes, some = std::clamp<int64_t>(count - v * kLanes, 0, kLanes);
            finish(sum, rest[i], x + i * stride + first, static_cast<float>(scale[i]), out + i * out_stride + first,
                   some);
          }
        }
      }
    }
  }
}

}  // namespace

// A GramKernel. The operands of some features are laid out at a time, each sample's in tiles of both kinds where a
// block lies on the diagonal.
void gram_tiles(const void* data, int64_t stride, int64_t dim, GramBlock block, double* out, int64_t out_stride,
                const Ahead&) {
  constexpr int64_t kOperandBytes = 512 << 10;  // of a second-level cache of 2 MiB, which these processors have
  const TileRegisters registers;
  const auto* x = static_cast<const bfloat16*>(data);
  const int64_t rows = block.row_end - block.row_begin, columns = block.column_end - block.column_begin;
  const bool on_diagonal = block.row_begin == block.column_begin;
  const int64_t tile_rows = tiles_of(rows, kTile), tile_columns = tiles_of(columns, kTile);
  const int64_t fit = kOperandBytes / kTileBytes / std::max<int64_t>(1, tile_rows + tile_columns);
  const int64_t depth = std::min(std::clamp<int64_t>(fit, 4, kMostTerms / kTerms), tiles_of(dim, kTerms));
  const int64_t length = depth * kTileBytes;  // of the tiles of kTile samples
  char* const left = reinterpret_cast<char*>(panel<bfloat16>(0, tile_rows * length / 2));
  char* const right = reinterpret_cast<char*>(panel<bfloat16>(1, tile_columns * length / 2));
  alignas(64) float sums[4][kTile * kTile];
  for (int64_t k = 0; k < dim; k += depth * kTerms) {
    const int64_t take = std::min(depth * kTerms, dim - k);
    const auto lay_out_samples = [&](int64_t begin, int64_t count, char* to_left, char* to_right) {
      for (int64_t i = 0; i < count; i += kTile) {
        lay_out(x + (begin + i) * stride + k, stride, std::min(kTile, count - i), take,
                to_left ? to_left + i / kTile * length : nullptr, to_right ? to_right + i / kTile * length : nullptr);
      }
    };
    lay_out_samples(block.row_begin, rows, left, on_diagonal ? right : nullptr);
    if (!on_diagonal) lay_out_samples(block.column_begin, columns, nullptr, right);
    finish_stores();
    for (int64_t i = 0; i < tile_rows; i += 2) {
      const int64_t height = std::min<int64_t>(2, tile_rows - i), end = on_diagonal ? i + height : tile_columns;
      for (int64_t j = 0; j < end; j += 2) {
        const int64_t breadth = std::min<int64_t>(2, end - j);
        multiply_of(height, breadth)(left + i * length, length, kTileBytes, 64, right + j * length, length, kTileBytes,
                                     64, tiles_of(take, kTerms), sums);
        for (int64_t r = i; r < i + height; ++r) {
          for (int64_t c = j; c < j + breadth; ++c) {
            add_tile(sums[(r - i) * 2 + c - j], std::min(kTile, rows - r * kTile), std::min(kTile, columns - c * kTile),
                     out + r * kTile * out_stride + c * kTile, out_stride);
          }
        }
      }
    }
  }
}

extern const NarrowKernels narrow_kernels = {bytes, pack, combine_tiles};

}  // namespace icsd::cpu::ICSD_ISA
