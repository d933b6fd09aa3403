#include "cpu/feature.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace icsd::cpu {
namespace {

using std::int64_t;

// The moments of a group in products of type C. The threads share first the samples of a few blocks out, to lay them out
// in panels, then tiles of the moments, so that the sums do not depend on the threads.
template <class C>
class Moments {
 public:
  Moments(const std::vector<Features>& stages, int64_t group, Shape shape, double eps, double* out, int threads)
      : stages_(stages),
        group_(group),
        samples_(shape.samples),
        eps_(eps),
        moments_(moments_of(stages)),
        out_(out),
        loops_(threads) {
    int64_t features = 0;
    for (const Features& stage : stages) features += padded(stage.features);
    const int64_t fit = kPanelBytes / (std::max<int64_t>(features, 1) * kBlock * sizeof(C));
    batch_ = std::clamp<int64_t>(fit, 1, blocks_of(samples_, kBlock)) * kBlock;
    panels_ = Buffer<C>(features * batch_);
    int64_t begin = 0;
    for (const Features& stage : stages) {
      begins_.push_back(begin);
      begin += padded(stage.features) * batch_;
    }
    for (std::size_t m = 0; m < moments_.size(); ++m) {
      for (int64_t row = 0; row < moments_[m].rows; row += tiles().panel) {
        for (int64_t column = 0; column < moments_[m].columns; column += tiles().panel) {
          if (moments_[m].left != moments_[m].right || column <= row) tiles_.push_back({&moments_[m], row, column});
        }
      }
    }
    sums_.resize(tiles_.size() * tiles().panel * tiles().panel);
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
  static constexpr int64_t kPanelBytes = 4 << 20;  // of the samples laid out at a time, to stay in a shared cache

  struct Tile {
    const Moment* moment;
    int64_t row, column;
  };

  static const TileKernels<C>& tiles() { return kernels().template tiles<C>(); }
  static int64_t padded(int64_t features) { return blocks_of(features, tiles().panel) * tiles().panel; }
  int64_t count(int64_t first, int64_t block) const { return std::min(kBlock, samples_ - first - block * kBlock); }

  void prepare(int64_t stage, int64_t first, int64_t block) {
    const Features& x = stages_[stage];
    const int64_t samples = count(first, block);
    const void* data = at(x, group_, first + block * kBlock, 0);
    C scale[kBlock];
    tiles().squares[static_cast<int>(x.dtype)](data, x.sample_stride, samples, x.features, scale);
    for (int64_t i = 0; i < samples; ++i) scale[i] = inverse_norm(scale[i], eps_);
    tiles().by_feature[static_cast<int>(x.dtype)](data, x.sample_stride, samples, x.features, scale,
                                                  panels_.data() + begins_[stage] + block * kBlock * tiles().panel,
                                                  batch_ * tiles().panel);
  }

  Panels<C> panels(int64_t stage, int64_t block, int64_t feature) const {
    return Panels<C>{panels_.data() + begins_[stage], tiles().panel, tiles().panel, batch_ * tiles().panel}.from(
        block * kBlock, feature);
  }

  void add(int64_t item, int64_t first, int64_t block) {
    const auto& [moment, row, column] = tiles_[item];
    C products[kMostPanel * kMostPanel];
    const int64_t side = tiles().panel, rows = std::min(side, moment->rows - row);
    tiles().multiply(panels(moment->left, block, row), panels(moment->right, block, column), rows, side,
                     count(first, block), products, side, false);
    double* sums = sums_.data() + item * side * side;
    for (int64_t k = 0; k < rows * side; ++k) sums[k] += products[k];
  }

  void put(int64_t item) {
    const auto& [moment, row, column] = tiles_[item];
    const int64_t side = tiles().panel;
    double* to = out_ + moment->offset;
    for (int64_t i = row; i < std::min(row + side, moment->rows); ++i) {
      for (int64_t j = column; j < std::min(column + side, moment->columns); ++j) {
        const double sum = sums_[item * side * side + (i - row) * side + (j - column)];
        to[i * moment->columns + j] = sum;
        if (moment->left == moment->right) to[j * moment->columns + i] = sum;
      }
    }
  }

  static constexpr int64_t kMostPanel = 48;

  const std::vector<Features>& stages_;
  int64_t group_, samples_;
  double eps_;
  std::vector<Moment> moments_;
  double* out_;
  Loops loops_;
  int64_t batch_;                // samples laid out at a time
  std::vector<int64_t> begins_;  // of the stages' panels
  Buffer<C> panels_{0};
  std::vector<Tile> tiles_;
  std::vector<double> sums_;
};

// What is left for a student.
Remainder remainder_for(const std::vector<Features>& stages, const double* moments, int64_t student) {
  const std::vector<Moment> all = moments_of(stages);
  const auto square = [&](const Moment& moment) {
    double sum = 0;
    for (int64_t k = 0; k < moment.rows * moment.columns; ++k) sum += moments[moment.offset + k] * moments[moment.offset + k];
    return sum;
  };
  return remainder_of(square(all[2 * student]), square(all[2 * student + 1]), square(all.back()));
}

// Whether float32 cannot tell some student from its teacher.
bool cancels(const std::vector<Features>& stages, const double* moments) {
  for (std::size_t student = 0; student + 1 < stages.size(); ++student) {
    if (remainder_for(stages, moments, student).fraction < kLeastRemainder) return true;
  }
  return false;
}

int threads_of(const std::vector<Features>& stages, Shape shape) {
  return threads_for(shape.samples * feature_moments(stages));
}

template <class C>
void compute_moments(const std::vector<Features>& stages, int64_t group, Shape shape, double eps, double* moments) {
  const int threads = threads_of(stages, shape);
  Moments<C> pass(stages, group, shape, eps, moments, threads);
  in_parallel(threads, [&](Member member) { pass.run(member); });
}

// The gradients of a group in products of type C.
template <class C>
class Gradients {
 public:
  Gradients(const std::vector<Features>& stages, const std::vector<Features>& outs, int64_t group, Shape shape,
            const Spec& spec, const double* moments, C grad, int threads)
      : stages_(stages),
        outs_(outs),
        group_(group),
        samples_(shape.samples),
        eps_(spec.eps),
        grad_(grad),
        blocks_(blocks_of(shape.samples, kBlock), threads) {
    const double scale = 4.0 / (static_cast<double>(shape.samples) * shape.samples);
    const int64_t teacher = static_cast<int64_t>(stages.size()) - 1;
    const std::vector<Moment> all = moments_of(stages);
    double weights = 0;
    for (int64_t k = 0; k < teacher; ++k) {
      const double weight = scale * spec.weights[k];
      weights += weight;
      if (outs[k].data) {
        add_term(k, k, weight, moments, all[2 * k], false);
        add_term(k, teacher, -weight, moments, all[2 * k + 1], true);
      }
      if (outs[teacher].data) add_term(teacher, k, -weight, moments, all[2 * k + 1], false);
    }
    if (outs[teacher].data) add_term(teacher, teacher, weights, moments, all.back(), false);
    int64_t widest = 0, features = 0;
    for (const Features& stage : stages) {
      widest = std::max(widest, padded(stage.features));
      begins_.push_back(features * kBlock);
      features += stage.features;
    }
    scratch_ = Buffer<C>(threads * (per_thread_ = kBlock * (features + widest)));
  }

  void run(Member member) {
    C* scratch = scratch_.data() + member.thread * per_thread_;
    blocks_.each(member, [&](int64_t block) { differentiate(block, scratch); });
  }

 private:
  // A part of the gradient with respect to `target`: the samples of `source` times a matrix.
  struct Term {
    int64_t target, source;
    Buffer<C> matrix;  // in panels: (features of the source, features of the target)
  };

  static const TileKernels<C>& tiles() { return kernels().template tiles<C>(); }
  static int64_t padded(int64_t features) { return blocks_of(features, tiles().panel) * tiles().panel; }

  void add_term(int64_t target, int64_t source, double weight, const double* moments, const Moment& moment,
                bool transposed) {
    const int64_t depth = stages_[source].features, width = stages_[target].features, panel = tiles().panel;
    Buffer<C> matrix(depth * padded(width));
    std::fill_n(matrix.data(), depth * padded(width), C(0));
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t r = 0; r < width; ++r) {
        const int64_t element = transposed ? r * moment.columns + k : k * moment.columns + r;
        matrix.data()[r / panel * depth * panel + k * panel + r % panel] =
            static_cast<C>(weight * moments[moment.offset + element]);
      }
    }
    terms_.push_back({target, source, std::move(matrix)});
  }

  void differentiate(int64_t block, C* scratch) {
    const int64_t first = block * kBlock, samples = std::min(kBlock, samples_ - first), panel = tiles().panel;
    const int64_t stages = static_cast<int64_t>(stages_.size());
    std::vector<C> squares(stages * kBlock), inverse(stages * kBlock);
    for (int64_t k = 0; k < stages; ++k) {
      const Features& x = stages_[k];
      const void* data = at(x, group_, first, 0);
      C *square = squares.data() + k * kBlock, *scale = inverse.data() + k * kBlock;
      tiles().squares[static_cast<int>(x.dtype)](data, x.sample_stride, samples, x.features, square);
      for (int64_t i = 0; i < samples; ++i) scale[i] = inverse_norm(square[i], eps_);
      tiles().by_sample[static_cast<int>(x.dtype)](data, x.sample_stride, samples, x.features, scale, scratch + begins_[k],
                                                   x.features * panel);
    }
    C* gradient = scratch + begins_.back() + kBlock * stages_.back().features;
    for (int64_t target = 0; target < stages; ++target) {
      const Features &x = stages_[target], &out = outs_[target];
      if (!out.data) continue;
      bool add = false;
      for (const Term& term : terms_) {
        if (term.target != target) continue;
        const int64_t depth = stages_[term.source].features;
        tiles().multiply({scratch + begins_[term.source], panel, panel, depth * panel},
                         {term.matrix.data(), panel, panel, depth * panel}, samples, x.features, depth, gradient,
                         padded(x.features), add);
        add = true;
      }
      for (int64_t i = 0; i < samples; ++i) {
        const int64_t item = target * kBlock + i;
        tiles().finish[static_cast<int>(x.dtype)](gradient + i * padded(x.features), at(x, group_, first + i, 0), x.features,
                                                  inverse[item], !is_clamped(squares[item], eps_), grad_,
                                                  at(out, group_, first + i, 0));
      }
    }
  }

  const std::vector<Features>& stages_;
  const std::vector<Features>& outs_;
  int64_t group_, samples_;
  double eps_;
  C grad_;
  Queue blocks_;
  std::vector<Term> terms_;
  std::vector<int64_t> begins_;  // of the stages' panels
  int64_t per_thread_ = 0;
  Buffer<C> scratch_{0};  // for each thread: a block of all stages in panels by sample, and of a gradient
};

template <class C>
void compute_gradients(const std::vector<Features>& stages, const std::vector<Features>& outs, int64_t group, Shape shape,
                       const Spec& spec, const double* moments, C grad) {
  const int threads = threads_of(stages, shape);
  Gradients<C> pass(stages, outs, group, shape, spec, moments, grad, threads);
  in_parallel(threads, [&](Member member) { pass.run(member); });
}

}  // namespace

template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, double* moments) {
  std::vector<double> scratch(moments ? 0 : feature_moments(stages));
  for (int64_t group = 0; group < shape.groups; ++group) {
    double* of_group = moments ? moments + group * feature_moments(stages) : scratch.data();
    compute_moments<C>(stages, group, shape, spec.eps, of_group);
    if (sizeof(C) < sizeof(double) && cancels(stages, of_group)) {
      compute_moments<double>(stages, group, shape, spec.eps, of_group);
    }
    double sum = 0;
    for (std::size_t student = 0; student + 1 < stages.size(); ++student) {
      sum += spec.weights[student] * remainder_for(stages, of_group, student).squares;
    }
    loss[group] = static_cast<C>(sum / std::max(1.0, static_cast<double>(shape.samples) * shape.samples));
  }
}

template <class C>
void distill_feature_backward(const C* grad, const double* moments, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Spec& spec) {
  for (int64_t group = 0; group < shape.groups; ++group) {
    const double* of_group = moments + group * feature_moments(stages);
    if (cancels(stages, of_group)) {
      compute_gradients<double>(stages, outs, group, shape, spec, of_group, grad[group]);
    } else {
      compute_gradients<C>(stages, outs, group, shape, spec, of_group, grad[group]);
    }
  }
}

#define ICSD_INSTANTIATE(C)                                                                                      \
  template void distill_feature<C>(const std::vector<Features>&, Shape, const Spec&, C*, double*);       \
  template void distill_feature_backward<C>(const C*, const double*, const std::vector<Features>&,               \
                                            const std::vector<Features>&, Shape, const Spec&);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cpu
