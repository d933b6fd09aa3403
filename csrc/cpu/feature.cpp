#include "cpu/feature.h"

#include <algorithm>

#include "cpu/kernels/covariance.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/norms.h"
#include "cpu/runtime/threads.h"

namespace icsd::cpu {
namespace {

using std::int64_t;

// Returns what remains for a student.
Remainder remainder_for(const std::vector<Features>& stages, const double* covariances, int64_t student) {
  const std::vector<Covariance> all = covariances_of(stages);
  const auto square = [&](const Covariance& covariance) {
    double sum = 0;
    for (int64_t k = 0; k < covariance.rows * covariance.columns; ++k)
      sum += covariances[covariance.offset + k] * covariances[covariance.offset + k];
    return sum;
  };
  return remainder_of(square(all[2 * student]), square(all[2 * student + 1]), square(all.back()));
}

// Tells whether float32 is too short to tell some student from the teacher.
bool cancels(const std::vector<Features>& stages, const double* covariances) {
  for (std::size_t student = 0; student + 1 < stages.size(); ++student) {
    if (remainder_for(stages, covariances, student).fraction < kLeastRemainder) return true;
  }
  return false;
}

int threads_of(const std::vector<Features>& stages, Shape shape) {
  return threads_for(shape.samples * covariance_elements(stages));
}

template <class C>
void compute_covariances(const std::vector<Features>& stages, int64_t group, Shape shape, double eps,
                         double* covariances) {
  const int threads = threads_of(stages, shape);
  Covariances<C> pass(stages, group, shape, eps, covariances, threads);
  in_parallel(threads, [&](Member member) { pass.run(member); });
}

// Computes the gradients of a group by products of type C.
template <class C>
class Gradients {
 public:
  Gradients(const std::vector<Features>& stages, const std::vector<Features>& outs, int64_t group, Shape shape,
            const Spec& spec, const double* covariances, C grad, int threads)
      : stages_(stages),
        outs_(outs),
        group_(group),
        samples_(shape.samples),
        eps_(spec.eps),
        grad_(grad),
        blocks_(blocks_of(shape.samples, kBlock), threads) {
    const double scale = 4.0 / (static_cast<double>(shape.samples) * shape.samples);
    const int64_t teacher = static_cast<int64_t>(stages.size()) - 1;
    const std::vector<Covariance> all = covariances_of(stages);
    double weights = 0;
    for (int64_t k = 0; k < teacher; ++k) {
      const double weight = scale * spec.weights[k];
      weights += weight;
      if (outs[k].data) {
        add_term(k, k, weight, covariances, all[2 * k], false);
        add_term(k, teacher, -weight, covariances, all[2 * k + 1], true);
      }
      if (outs[teacher].data) add_term(teacher, k, -weight, covariances, all[2 * k + 1], false);
    }
    if (outs[teacher].data) add_term(teacher, teacher, weights, covariances, all.back(), false);
    int64_t widest = 0, dim = 0;
    for (const Features& stage : stages) {
      widest = std::max(widest, padded(stage.dim));
      begins_.push_back(dim * kBlock);
      dim += stage.dim;
    }
    workspace_ = Buffer<C>(threads * (per_thread_ = kBlock * (dim + widest)));
  }

  void run(Member member) {
    C* workspace = workspace_.data() + member.thread * per_thread_;
    blocks_.each(member, [&](int64_t block) { backward_block(block, workspace); });
  }

 private:
  // One term of the gradient with respect to `target`: the samples of `source` times a matrix.
  struct Term {
    int64_t target, source;
    Buffer<C> matrix;  // in panels: (features of the source, features of the target)
  };

  static const ProductKernels<C>& products() { return kernels().template products<C>(); }
  static int64_t padded(int64_t dim) { return blocks_of(dim, products().panel) * products().panel; }

  void add_term(int64_t target, int64_t source, double weight, const double* covariances, const Covariance& covariance,
                bool transposed) {
    const int64_t depth = stages_[source].dim, width = stages_[target].dim, panel = products().panel;
    Buffer<C> matrix(depth * padded(width));
    std::fill_n(matrix.data(), depth * padded(width), C(0));
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t r = 0; r < width; ++r) {
        const int64_t element = transposed ? r * covariance.columns + k : k * covariance.columns + r;
        matrix.data()[r / panel * depth * panel + k * panel + r % panel] =
            static_cast<C>(weight * covariances[covariance.offset + element]);
      }
    }
    terms_.push_back({target, source, std::move(matrix)});
  }

  void backward_block(int64_t block, C* workspace) {
    const int64_t first = block * kBlock, samples = std::min(kBlock, samples_ - first), panel = products().panel;
    const int64_t stages = static_cast<int64_t>(stages_.size());
    std::vector<C> squares(stages * kBlock), inverse(stages * kBlock);
    for (int64_t k = 0; k < stages; ++k) {
      const Features& x = stages_[k];
      const void* data = at(x, group_, first, 0);
      C *square = squares.data() + k * kBlock, *scale = inverse.data() + k * kBlock;
      products().squares[static_cast<int>(x.dtype)](data, x.sample_stride, samples, x.dim, square);
      for (int64_t i = 0; i < samples; ++i) scale[i] = inverse_norm(square[i], eps_);
      products().by_sample[static_cast<int>(x.dtype)](data, x.sample_stride, samples, x.dim, scale,
                                                      workspace + begins_[k], x.dim * panel);
    }
    C* gradient = workspace + begins_.back() + kBlock * stages_.back().dim;
    for (int64_t target = 0; target < stages; ++target) {
      const Features &x = stages_[target], &out = outs_[target];
      if (!out.data) continue;
      bool add = false;
      for (const Term& term : terms_) {
        if (term.target != target) continue;
        const int64_t depth = stages_[term.source].dim;
        products().multiply({workspace + begins_[term.source], panel, panel, depth * panel},
                            {term.matrix.data(), panel, panel, depth * panel}, samples, x.dim, depth, gradient,
                            padded(x.dim), add);
        add = true;
      }
      for (int64_t i = 0; i < samples; ++i) {
        const int64_t item = target * kBlock + i;
        products().finish[static_cast<int>(x.dtype)](gradient + i * padded(x.dim), at(x, group_, first + i, 0), x.dim,
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
  Buffer<C> workspace_{0};  // for each thread: a block of all stages in panels by sample, and of a gradient
};

template <class C>
void compute_gradients(const std::vector<Features>& stages, const std::vector<Features>& outs, int64_t group,
                       Shape shape, const Spec& spec, const double* covariances, C grad) {
  const int threads = threads_of(stages, shape);
  Gradients<C> pass(stages, outs, group, shape, spec, covariances, grad, threads);
  in_parallel(threads, [&](Member member) { pass.run(member); });
}

}  // namespace

template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, double* covariances) {
  std::vector<double> workspace(covariances ? 0 : covariance_elements(stages));
  for (int64_t group = 0; group < shape.groups; ++group) {
    double* of_group = covariances ? covariances + group * covariance_elements(stages) : workspace.data();
    compute_covariances<C>(stages, group, shape, spec.eps, of_group);
    if (sizeof(C) < sizeof(double) && cancels(stages, of_group)) {
      compute_covariances<double>(stages, group, shape, spec.eps, of_group);
    }
    double sum = 0;
    for (std::size_t student = 0; student + 1 < stages.size(); ++student) {
      sum += spec.weights[student] * remainder_for(stages, of_group, student).squares;
    }
    loss[group] = static_cast<C>(sum / std::max(1.0, static_cast<double>(shape.samples) * shape.samples));
  }
}

template <class C>
void distill_feature_backward(const C* grad, const double* covariances, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Spec& spec) {
  for (int64_t group = 0; group < shape.groups; ++group) {
    const double* of_group = covariances + group * covariance_elements(stages);
    if (cancels(stages, of_group)) {
      compute_gradients<double>(stages, outs, group, shape, spec, of_group, grad[group]);
    } else {
      compute_gradients<C>(stages, outs, group, shape, spec, of_group, grad[group]);
    }
  }
}

#define ICSD_INSTANTIATE(C)                                                                        \
  template void distill_feature<C>(const std::vector<Features>&, Shape, const Spec&, C*, double*); \
  template void distill_feature_backward<C>(const C*, const double*, const std::vector<Features>&, \
                                            const std::vector<Features>&, Shape, const Spec&);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cpu
