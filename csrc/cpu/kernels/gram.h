// Gram matrices by all threads of a parallel region. gram.cpp is the kernel that each of them runs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/features.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/norms.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/threads.h"

namespace icsd::cpu {

using std::int64_t;

// Gram matrices, both halves of each. Rows are `stride` apart, groups `group_stride`.
template <class C>
struct Matrices {
  C* data;
  int64_t stride, group_stride;

  C* row(int64_t group, int64_t i) const { return data + group * group_stride + i * stride; }
};

// Computes the Gram matrices of all stages and groups by the threads of one parallel region: each calls `accumulate`
// and, after a barrier, `finish`. If `center`, they are those of the samples minus the mean of their group, which is
// subtracted from a few features at a time: K itself would cancel where the mean dominates.
//
// With few samples, each thread takes a split of the features, and the sums are added in a fixed order. There are fewer
// splits than threads where their sums would take too much memory.
// With several groups, each thread takes tiles of the matrices, and nothing is left to add.
// With many samples it does too, and the features of all samples are packed, some at a time, to be used for many tiles.
template <class C>
class Grams {
 public:
  Grams(const std::vector<Features>& stages, const std::vector<Matrices<C>>& out, Shape shape, int threads,
        bool center = false, const void* next = nullptr)
      : stages_(stages),
        out_(out),
        shape_(shape),
        threads_(threads),
        centers_(center),
        next_(next),
        matrices_(static_cast<int64_t>(stages.size()) * shape.groups),
        tiles_(blocks_of(shape.samples, kTileSize)),
        splits_(splits()),
        tile_size_(splits_ ? shape.samples : std::min(shape.samples, kTileSize)),
        blocks_(matrices_ * (tiles_ * (tiles_ + 1) / 2), threads),
        sums_((splits_ ? matrices_ * splits_ : threads) * tile_size_ * tile_size_),
        loops_(threads),
        panels_(lays_out() ? blocks_of(shape.samples, kBlock) * kBlock * kFeatures : 0),
        products_(lays_out() ? threads * 2 * kBlock * kBlock : 0),
        centered_dim_(center ? centered_dim() : 0),
        centered_((lays_out() ? 1 : threads) * shape.samples * centered_dim_) {}

  void accumulate(Member member) {
    if (lays_out()) {
      for (int64_t matrix = 0; matrix < matrices_; ++matrix) multiply(member, matrix);
      return;
    }
    if (splits_) {
      if (member.thread >= splits_) return;
      for (int64_t matrix = 0; matrix < matrices_; ++matrix) {
        const int64_t dim = stages_[matrix / shape_.groups].dim;
        const Range lines = split_of(blocks_of(dim, kLine), member.thread, splits_);
        double* const sums = partial(matrix, member.thread);
        std::fill_n(sums, tile_size_ * tile_size_, 0.0);
        add_block(matrix, {0, tile_size_, 0, tile_size_}, {lines.begin * kLine, std::min(lines.end * kLine, dim)}, sums,
                  member.thread, {});
      }
      return;
    }
    double* sums = sums_.data() + member.thread * tile_size_ * tile_size_;
    blocks_.each(member, [&](int64_t item) {
      const int64_t per_matrix = tiles_ * (tiles_ + 1) / 2, matrix = item / per_matrix;
      const auto [row, column] = in_triangle(item % per_matrix);
      const GramBlock block{row * kTileSize, std::min((row + 1) * kTileSize, shape_.samples), column * kTileSize,
                            std::min((column + 1) * kTileSize, shape_.samples)};
      std::fill_n(sums, (block.row_end - block.row_begin) * tile_size_, 0.0);
      add_block(matrix, block, {0, stages_[matrix / shape_.groups].dim}, sums, member.thread, ahead_of(matrix, block));
      const Matrices<C>& out = out_[matrix / shape_.groups];
      kernels().template put<C>()(sums, tile_size_, block, out.row(matrix % shape_.groups, 0), out.stride);
    });
  }

  void finish(Member member) {
    if (!splits_) return;
    const int64_t n = shape_.samples;
    const Range rows = split_of(matrices_ * n, member.thread, member.threads);
    for (int64_t item = rows.begin; item < rows.end; ++item) {
      const int64_t matrix = item / n, i = item % n;
      for (int64_t j = 0; j <= i; ++j) {
        double sum = 0;
        for (int owner = 0; owner < splits_; ++owner) sum += partial(matrix, owner)[i * n + j];
        put(matrix, i, j, sum);
      }
    }
  }

 private:
  static constexpr int64_t kMaxSplit = 512;      // samples up to which the features are split
  static constexpr int64_t kMostSums = 1 << 24;  // of all splits: 128 MiB
  static constexpr int64_t kTileSize = 128;      // rows and columns of a tile of the matrix
  static constexpr int64_t kLine = 64;           // splits begin on whole cache lines of features
  static constexpr int64_t kFeatures = 1024;     // packed at a time
  static constexpr DType kComputeType = sizeof(C) == sizeof(double) ? DType::float64 : DType::float32;

  // Returns the number of splits of the features, or 0 if tiles of the matrices are shared among the threads.
  int splits() const {
    if (threads_ == 1 || shape_.samples > kMaxSplit || shape_.groups >= 4 * threads_) return 0;
    int64_t fit = 1;  // no more than lines of features
    for (const Features& x : stages_) fit = std::max(fit, blocks_of(x.dim, kLine));
    fit = std::min(fit, kMostSums / std::max<int64_t>(matrices_ * shape_.samples * shape_.samples, 1));
    if (fit < threads_ && matrices_ * tiles_ >= threads_) return 0;
    return fit > 1 ? static_cast<int>(std::min<int64_t>(fit, threads_)) : 0;
  }

  // Returns how many features are centered at a time: in the second cache, or as many as are packed.
  int64_t centered_dim() const {
    constexpr int64_t kBytes = 256 << 10;
    if (lays_out()) return kFeatures;
    const int64_t fit = kBytes / (std::max<int64_t>(shape_.samples, 1) * static_cast<int64_t>(sizeof(C)));
    return (std::clamp<int64_t>(fit / kLine, 1, 16) | 1) * kLine;  // rows are not a power of two apart
  }

  // The panels hold numbers of compute type, so that a processor that multiplies bfloat16 is faster without them.
  bool lays_out() const {
    const auto is_bfloat16 = [](const Features& x) { return x.dtype == DType::bfloat16; };
    const bool narrow = kernels().narrow && std::all_of(stages_.begin(), stages_.end(), is_bfloat16);
    return matrices_ > 0 && shape_.samples > kMaxSplit && (centers_ || !narrow);
  }

  struct Place {
    int64_t row, column;
  };
  static Place in_triangle(int64_t item) {
    Place place{0, item};
    for (; place.column > place.row; ++place.row) place.column -= place.row + 1;
    return place;
  }

  void multiply(Member member, int64_t matrix) {
    const Features& x = stages_[matrix / shape_.groups];
    const int64_t group = matrix % shape_.groups, n = shape_.samples, blocks = blocks_of(n, kBlock);
    const auto& products = kernels().template products<C>();
    C *product = products_.data() + member.thread * 2 * kBlock * kBlock, *transposed = product + kBlock * kBlock;
    for (int64_t k = 0; k == 0 || k < x.dim; k += kFeatures) {
      const int64_t depth = std::min(kFeatures, x.dim - k);
      const Panels<C> panels{panels_.data(), products.panel, products.panel, products.panel * depth};
      const Features from = centered_dim_ ? center(member, x, group, k, depth) : x;
      loops_.each(member, blocks, [&](int64_t block) {
        const void* const first = at(from, group, block * kBlock, centered_dim_ ? 0 : k);
        products.by_sample[static_cast<int>(from.dtype)](first, from.sample_stride,
                                                         std::min(kBlock, n - block * kBlock), depth, nullptr,
                                                         panels_.data() + block * kBlock * depth, panels.panel_stride);
      });
      loops_.each(member, blocks * (blocks + 1) / 2, [&](int64_t item) {
        const auto [row, column] = in_triangle(item);
        const int64_t top = row * kBlock, left = column * kBlock;
        const int64_t rows = std::min(kBlock, n - top), columns = std::min(kBlock, n - left);
        const bool diagonal = row == column;
        const int64_t width = diagonal ? products.panel : columns;  // what is above the diagonal is left out
        for (int64_t j = 0; j < columns; j += width) {
          const int64_t first = diagonal ? j : 0;
          products.multiply(panels.from(0, top + first), panels.from(0, left + j), rows - first,
                            std::min(width, columns - j), depth, product + first * kBlock + j, kBlock, false);
        }
        for (int64_t i = 0; i < rows; ++i) {
          C *to = out_[matrix / shape_.groups].row(group, top + i) + left, *sums = product + i * kBlock;
          const int64_t count = diagonal ? i + 1 : columns;
          for (int64_t j = 0; j < count; ++j) to[j] = sums[j] += k ? to[j] : 0;
        }
        if (k + depth < x.dim) return;
        products.transpose(product, transposed);
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t first = diagonal ? j : 0;
          std::copy_n(transposed + j * kBlock + first, rows - first,
                      out_[matrix / shape_.groups].row(group, left + j) + top + first);
        }
      });
    }
  }

  // Centers `depth` features from k on by all threads, for one group.
  Features center(Member member, const Features& x, int64_t group, int64_t k, int64_t depth) {
    loops_.each(member, blocks_of(depth, kLine), [&](int64_t line) {
      const int64_t begin = line * kLine;
      kernels().template products<C>().center[static_cast<int>(x.dtype)](at(x, group, 0, k + begin), x.sample_stride,
                                                                         shape_.samples, std::min(kLine, depth - begin),
                                                                         centered_.data() + begin, centered_dim_);
    });
    return {centered_.data(), kComputeType, depth, 0, centered_dim_};
  }

  // Returns what is needed after a block of sums: the elements of the matrix that they are written to, on both sides of
  // the diagonal, and the features of the next matrix.
  Ahead ahead_of(int64_t matrix, GramBlock block) const {
    const int64_t stage = matrix / shape_.groups, group = matrix % shape_.groups;
    const int64_t rows = block.row_end - block.row_begin, columns = block.column_end - block.column_begin;
    const Matrices<C>& out = out_[stage];
    const int64_t stride = out.stride * sizeof(C), bytes = sizeof(C);
    Ahead ahead{};
    ahead.set(0, out.row(group, block.row_begin) + block.column_begin, stride, rows, columns * bytes);
    if (block.row_begin != block.column_begin) {
      ahead.set(1, out.row(group, block.column_begin) + block.row_begin, stride, columns, rows * bytes);
    }
    if (block.column_end < shape_.samples) return ahead;  // not the last block of this matrix
    const bool last = stage + 1 == static_cast<int64_t>(stages_.size());
    const Features& x = stages_[last ? 0 : stage + 1];
    const void* const data = last ? next_ : at(x, group, 0, 0);
    const int64_t size = size_of(x.dtype);
    if (data && shape_.groups == 1) ahead.set(2, data, x.sample_stride * size, shape_.samples, x.dim * size);
    return ahead;
  }

  double* partial(int64_t matrix, int thread) {
    return sums_.data() + (matrix * splits_ + thread) * tile_size_ * tile_size_;
  }

  void add_block(int64_t matrix, GramBlock block, Range range, double* sums, int thread, const Ahead& ahead) {
    const Features& x = stages_[matrix / shape_.groups];
    if (centered_dim_) {
      C* const centered = centered_.data() + thread * shape_.samples * centered_dim_;
      for (int64_t k = range.begin; k < range.end; k += centered_dim_) {
        const int64_t dim = std::min(centered_dim_, range.end - k);
        kernels().template products<C>().center[static_cast<int>(x.dtype)](
            at(x, matrix % shape_.groups, 0, k), x.sample_stride, shape_.samples, dim, centered, centered_dim_);
        kernels().gram[static_cast<int>(kComputeType)](centered, centered_dim_, dim, block, sums, tile_size_, {});
      }
      return;
    }
    kernels().gram[static_cast<int>(x.dtype)](at(x, matrix % shape_.groups, 0, range.begin), x.sample_stride,
                                              range.end - range.begin, block, sums, tile_size_, ahead);
  }

  void put(int64_t matrix, int64_t i, int64_t j, double value) {
    const Matrices<C>& out = out_[matrix / shape_.groups];
    out.row(matrix % shape_.groups, i)[j] = out.row(matrix % shape_.groups, j)[i] = static_cast<C>(value);
  }

  const std::vector<Features>& stages_;
  const std::vector<Matrices<C>>& out_;
  Shape shape_;
  int threads_;
  bool centers_;
  const void* next_;  // the features of the first stage that are read after these, or null
  int64_t matrices_;
  int64_t tiles_;
  int splits_;
  int64_t tile_size_;
  Queue blocks_;
  Buffer<double> sums_;
  Loops loops_;
  Buffer<C> panels_, products_;
  int64_t centered_dim_;  // 0 if nothing is centered
  Buffer<C> centered_;    // (samples, centered_dim) of each thread, or of all if features are packed
};

}  // namespace icsd::cpu
