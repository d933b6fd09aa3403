// The covariances of core/covariance.h by all threads of a parallel region.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/covariance.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/norms.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/threads.h"

namespace icsd::cpu {

using std::int64_t;

// Computes the covariances of a group by products of type C. The threads first share the samples of a few blocks, which
// they pack into panels, then the tiles of the covariances. So the sums do not depend on the number of threads.
template <class C>
class Covariances {
 public:
  Covariances(const std::vector<Features>& stages, int64_t group, Shape shape, double eps, double* out, int threads)
      : stages_(stages),
        group_(group),
        samples_(shape.samples),
        eps_(eps),
        covariances_(covariances_of(stages)),
        out_(out),
        loops_(threads) {
    int64_t dim = 0;
    for (const Features& stage : stages) dim += padded(stage.dim);
    const int64_t fit = kPanelBytes / (std::max<int64_t>(dim, 1) * kBlock * sizeof(C));
    batch_ = std::clamp<int64_t>(fit, 1, blocks_of(samples_, kBlock)) * kBlock;
    panels_ = Buffer<C>(dim * batch_);
    int64_t begin = 0;
    for (const Features& stage : stages) {
      begins_.push_back(begin);
      begin += padded(stage.dim) * batch_;
    }
    for (std::size_t m = 0; m < covariances_.size(); ++m) {
      for (int64_t row = 0; row < covariances_[m].rows; row += products().panel) {
        for (int64_t column = 0; column < covariances_[m].columns; column += products().panel) {
          if (covariances_[m].left != covariances_[m].right || column <= row)
            tiles_.push_back({&covariances_[m], row, column});
        }
      }
    }
    sums_.resize(tiles_.size() * products().panel * products().panel);
  }

  void run(Member member) {
    const int64_t stages = static_cast<int64_t>(stages_.size()), count = static_cast<int64_t>(tiles_.size());
    for (int64_t first = 0; first < samples_; first += batch_) {
      const int64_t blocks = blocks_of(std::min(batch_, samples_ - first), kBlock);
      loops_.each(member, stages * blocks, [&](int64_t item) { prepare(item / blocks, first, item % blocks); });
      loops_.each(member, count, [&](int64_t item) {
        for (int64_t block = 0; block < blocks; ++block) add(item, first, block);
      });
    }
    loops_.each(member, count, [&](int64_t item) { put(item); });
  }

 private:
  static constexpr int64_t kPanelBytes = 4 << 20;  // of the samples packed at a time, which stay in a shared cache

  struct Tile {
    const Covariance* covariance;
    int64_t row, column;
  };

  static const ProductKernels<C>& products() { return kernels().template products<C>(); }
  static int64_t padded(int64_t dim) { return blocks_of(dim, products().panel) * products().panel; }
  int64_t count(int64_t first, int64_t block) const { return std::min(kBlock, samples_ - first - block * kBlock); }

  void prepare(int64_t stage, int64_t first, int64_t block) {
    const Features& x = stages_[stage];
    const int64_t samples = count(first, block);
    const void* data = at(x, group_, first + block * kBlock, 0);
    C scale[kBlock];
    products().squares[static_cast<int>(x.dtype)](data, x.sample_stride, samples, x.dim, scale);
    for (int64_t i = 0; i < samples; ++i) scale[i] = inverse_norm(scale[i], eps_);
    products().by_feature[static_cast<int>(x.dtype)](
        data, x.sample_stride, samples, x.dim, scale,
        panels_.data() + begins_[stage] + block * kBlock * products().panel, batch_ * products().panel);
  }

  Panels<C> panels(int64_t stage, int64_t block, int64_t feature) const {
    return Panels<C>{panels_.data() + begins_[stage], products().panel, products().panel, batch_ * products().panel}
        .from(block * kBlock, feature);
  }

  void add(int64_t item, int64_t first, int64_t block) {
    const auto& [covariance, row, column] = tiles_[item];
    C sums_of_block[kMostPanel * kMostPanel];
    const int64_t size = products().panel, rows = std::min(size, covariance->rows - row);
    products().multiply(panels(covariance->left, block, row), panels(covariance->right, block, column), rows, size,
                        count(first, block), sums_of_block, size, false);
    double* sums = sums_.data() + item * size * size;
    for (int64_t k = 0; k < rows * size; ++k) sums[k] += sums_of_block[k];
  }

  void put(int64_t item) {
    const auto& [covariance, row, column] = tiles_[item];
    const int64_t size = products().panel;
    double* to = out_ + covariance->offset;
    for (int64_t i = row; i < std::min(row + size, covariance->rows); ++i) {
      for (int64_t j = column; j < std::min(column + size, covariance->columns); ++j) {
        const double sum = sums_[item * size * size + (i - row) * size + (j - column)];
        to[i * covariance->columns + j] = sum;
        if (covariance->left == covariance->right) to[j * covariance->columns + i] = sum;
      }
    }
  }

  static constexpr int64_t kMostPanel = 48;

  const std::vector<Features>& stages_;
  int64_t group_, samples_;
  double eps_;
  std::vector<Covariance> covariances_;
  double* out_;
  Loops loops_;
  int64_t batch_;                // samples packed at a time
  std::vector<int64_t> begins_;  // of the stages' panels
  Buffer<C> panels_{0};
  std::vector<Tile> tiles_;
  std::vector<double> sums_;
};

}  // namespace icsd::cpu
