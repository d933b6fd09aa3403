#include "cpu/streamed.h"

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/threads.h"

namespace icsd::cpu {
namespace {

using std::int64_t;

// The samples of one stage and group in panels, with norm 1 or, for a loss of products, as they are.
template <class C>
class PackedInput {
 public:
  // A stage whose gradient is wanted has panels by feature too.
  PackedInput(const Features& x, int64_t group, int64_t samples, bool wanted)
      : x_(x),
        group_(group),
        samples_(samples),
        squares_(samples),
        inverse_norms_(samples),
        by_sample_(blocks_of(samples, products().panel) * products().panel * x.dim),
        by_feature_(wanted ? samples * padded_dim() : 0) {}

  int64_t padded_dim() const { return blocks_of(x_.dim, products().panel) * products().panel; }
  const C* squares() const { return squares_.data(); }

  // Packs a block of samples. Their squared norms come from `squares`, of all samples, unless it is null.
  void prepare(int64_t block, const C* squares, bool normalize, double eps) {
    const int64_t first = block * kBlock, count = std::min(kBlock, samples_ - first);
    const int dtype = static_cast<int>(x_.dtype);
    const void* x = at(x_, group_, first, 0);
    if (squares) {
      std::copy_n(squares + first, count, squares_.data() + first);
    } else {
      products().squares[dtype](x, x_.sample_stride, count, x_.dim, squares_.data() + first);
    }
    for (int64_t i = first; i < first + count; ++i) inverse_norms_[i] = normalize ? inverse_norm(squares_[i], eps) : 1;
    products().by_sample[dtype](x, x_.sample_stride, count, x_.dim, inverse_norms_.data() + first,
                                by_sample_.data() + first * x_.dim, products().panel * x_.dim);
    if (by_feature_.data()) {
      products().by_feature[dtype](x, x_.sample_stride, count, x_.dim, inverse_norms_.data() + first,
                                   by_feature_.data() + first * products().panel, products().panel * samples_);
    }
  }

  // Computes the block (row, column) of X̂ X̂ᵀ.
  void multiply(int64_t row, int64_t column, C* block) const {
    const Panels<C> panels{by_sample_.data(), products().panel, products().panel, products().panel * x_.dim};
    products().multiply(panels.from(0, row * kBlock), panels.from(0, column * kBlock),
                        std::min(kBlock, samples_ - row * kBlock), std::min(kBlock, samples_ - column * kBlock), x_.dim,
                        block, kBlock, false);
  }

  // Adds to `sums` the transpose of `matrix`, (samples of the block) x (outputs), times the samples of the block.
  void combine(const C* matrix, int64_t outputs, int64_t block, C* sums) const {
    const Panels<C> panels{by_feature_.data(), products().panel, products().panel, products().panel * samples_};
    products().multiply({matrix, kBlock, kBlock, 0}, panels.from(block * kBlock, 0), outputs, x_.dim,
                        std::min(kBlock, samples_ - block * kBlock), sums, padded_dim(), true);
  }

  // Computes the gradient of sample i from the gradient of its normalized form.
  void finish(int64_t i, const C* gradient, bool normalized, double eps, C factor, const Features& out) const {
    products().finish[static_cast<int>(x_.dtype)](gradient, at(x_, group_, i, 0), x_.dim, inverse_norms_[i],
                                                  normalized && !is_clamped(squares_[i], eps), factor,
                                                  at(out, group_, i, 0));
  }

 private:
  static const ProductKernels<C>& products() { return kernels().template products<C>(); }

  Features x_;
  int64_t group_, samples_;
  std::vector<C> squares_, inverse_norms_;
  Buffer<C> by_sample_, by_feature_;
};

// Walks over a symmetric matrix of blocks, `window` x `window` of them at a time. The threads of a parallel region
// first share the calls `make(row, column, slot)` for every block of the lower triangle. Then they share the blocks of
// samples: for each there is a call `take(samples, other, slot, transposed)` for each block (samples, other) or,
// transposed, (other, samples), in the order of `other`. The order of the calls for a block of samples depends neither
// on `window` nor on the threads, so results do not either.
template <class Make, class Take>
void walk(Member member, Loops& loops, int64_t blocks, int64_t window, const Make& make, const Take& take) {
  for (int64_t top = 0; top < blocks; top += window) {
    for (int64_t left = 0; left <= top; left += window) {
      const int64_t bottom = std::min(top + window, blocks), right = std::min(left + window, blocks);
      const auto slot = [&](int64_t row, int64_t column) { return (row - top) * window + (column - left); };
      loops.each(member, (bottom - top) * window, [&](int64_t item) {
        const int64_t row = top + item / window, column = left + item % window;
        if (column <= row) make(row, column, item);
      });
      const int64_t apart = left < top ? right - left : 0;
      loops.each(member, bottom - top + apart, [&](int64_t item) {
        const int64_t samples = item < apart ? left + item : top + item - apart;
        if (samples >= top) {
          for (int64_t other = left; other < std::min(right, samples + 1); ++other) {
            take(samples, other, slot(samples, other), false);
          }
        }
        if (samples < right) {
          for (int64_t other = std::max(top, samples + 1); other < bottom; ++other) {
            take(samples, other, slot(other, samples), true);
          }
        }
      });
    }
  }
}

constexpr int64_t kLeastWindow = 6, kMostWindow = 16;
int64_t window_for(int64_t blocks, int threads) {
  return std::min(blocks, std::clamp<int64_t>(threads, kLeastWindow, kMostWindow));
}

// The part that both passes share: the packed stages of a group and the blocks of the matrices of each thread.
template <class C, template <class> class D>
class Group {
 public:
  Group(const std::vector<Features>& stages, const std::vector<Features>& outs, int64_t group, Shape shape,
        const Spec& spec, int threads)
      : spec_(spec),
        arguments_{spec.parameters.data(), static_cast<C>(shape.samples), static_cast<C>(spec.eps)},
        loss_(arguments_),
        rows_(kernels().template rows<C>().of[static_cast<int>(spec.loss)]),
        samples_(shape.samples),
        blocks_(blocks_of(shape.samples, kBlock)),
        window_(window_for(blocks_, threads)),
        students_(static_cast<int64_t>(stages.size()) - 1),
        loops_(threads),
        ones_(kBlock, 1),
        workspace_(threads * kBuffers * kBlock * kBlock) {
    for (std::size_t k = 0; k < stages.size(); ++k) {
      stages_.emplace_back(stages[k], group, samples_, !outs.empty() && outs[k].data);
    }
  }

 protected:
  using Row = typename D<C>::template Row<C>;
  static constexpr int64_t kBuffers = 4;

  void prepare(Member member, const C* saved) {
    loops_.each(member, blocks_ * (students_ + 1), [&](int64_t item) {
      const int64_t stage = item / blocks_;
      stages_[stage].prepare(item % blocks_, saved ? saved + stage * samples_ : nullptr, loss_.similarities, spec_.eps);
    });
  }

  int64_t count(int64_t block) const { return std::min(kBlock, samples_ - block * kBlock); }
  C* workspace(Member member, int index) {
    return workspace_.data() + (member.thread * kBuffers + index) * kBlock * kBlock;
  }
  SimilarityRow<C> row(const C* block, int64_t i) const { return {block + i * kBlock, ones_.data(), 1}; }

  const Spec& spec_;
  LossArguments<C> arguments_;
  D<C> loss_;
  const RowKernels<C>& rows_;
  int64_t samples_, blocks_, window_, students_;
  Loops loops_;
  std::vector<C> ones_;
  Buffer<C> workspace_;
  std::vector<PackedInput<C>> stages_;
};

template <class C, template <class> class D>
class Forward : Group<C, D> {
 public:
  Forward(const std::vector<Features>& stages, int64_t group, Shape shape, const Spec& spec, int threads)
      : Group<C, D>(stages, {}, group, shape, spec, threads),
        whole_(students_ * samples_),
        parts_(window_ * window_ * 2 * students_ * kBlock) {}

  void run(Member member) {
    this->prepare(member, nullptr);
    walk(
        member, this->loops_, blocks_, window_,
        [&](int64_t row, int64_t column, int64_t slot) { forward_block(member, row, column, slot); },
        [&](int64_t samples, int64_t, int64_t slot, bool transposed) {
          for (int64_t student = 0; student < students_; ++student) {
            const Row* part = parts(slot, transposed, student);
            Row* whole = whole_.data() + student * samples_ + samples * kBlock;
            for (int64_t i = 0; i < this->count(samples); ++i) loss_.merge(whole[i], part[i]);
          }
        });
  }

  C loss() const {
    double loss = 0;
    for (int64_t student = 0; student < students_; ++student) {
      double sum = 0;
      for (int64_t i = 0; i < samples_; ++i) sum += loss_.value(whole_[student * samples_ + i]);
      loss += spec_.weights[student] * sum;
    }
    return static_cast<C>(loss);
  }

  void save(C* saved) const {
    for (const PackedInput<C>& stage : stages_) saved = std::copy_n(stage.squares(), samples_, saved);
    std::fill_n(saved, students_ * kMaxStatistics * samples_, C(0));
    for (int64_t item = 0; item < students_ * samples_; ++item) {
      C numbers[kMaxStatistics];
      loss_.statistics(whole_[item], numbers);
      C* to = saved + item / samples_ * kMaxStatistics * samples_ + item % samples_;
      for (int k = 0; k < D<C>::kStatistics; ++k) to[k * samples_] = numbers[k];
    }
  }

 private:
  using Base = Group<C, D>;
  using Base::blocks_, Base::loss_, Base::spec_, Base::samples_, Base::window_, Base::stages_, Base::students_;
  using typename Base::Row;

  Row* parts(int64_t slot, bool transposed, int64_t student) {
    return parts_.data() + ((slot * 2 + transposed) * students_ + student) * kBlock;
  }

  void forward_block(Member member, int64_t row, int64_t column, int64_t slot) {
    C *t = this->workspace(member, 0), *s = this->workspace(member, 1);
    C *t_transposed = this->workspace(member, 2), *s_transposed = this->workspace(member, 3);
    const auto transpose = kernels().template products<C>().transpose;
    stages_[students_].multiply(row, column, t);
    if (row != column) transpose(t, t_transposed);
    for (int64_t student = 0; student < students_; ++student) {
      stages_[student].multiply(row, column, s);
      forward_rows(s, t, row, column, parts(slot, false, student));
      if (row == column) continue;
      transpose(s, s_transposed);
      forward_rows(s_transposed, t_transposed, column, row, parts(slot, true, student));
    }
  }

  void forward_rows(const C* s, const C* t, int64_t row, int64_t column, Row* part) {
    for (int64_t i = 0; i < this->count(row); ++i) {
      const auto add = [&](int64_t begin, int64_t end) {
        this->rows_.forward(this->arguments_, this->row(s, i), this->row(t, i), begin, end, part + i);
      };
      part[i] = Row{};
      if (row == column && !loss_.diagonal) {
        add(0, i);
        add(i + 1, this->count(column));
      } else {
        add(0, this->count(column));
      }
    }
  }

  std::vector<Row> whole_, parts_;
};

template <class C, template <class> class D>
class Backward : Group<C, D> {
 public:
  Backward(const std::vector<Features>& stages, const std::vector<Features>& outs, int64_t group, Shape shape,
           const Spec& spec, const C* saved, C grad, int threads)
      : Group<C, D>(stages, outs, group, shape, spec, threads), outs_(outs), saved_(saved), grad_(grad) {
    for (std::size_t k = 0; k < stages.size(); ++k) {
      const bool wanted = outs[k].data;
      derivatives_.emplace_back(wanted ? window_ * window_ * 2 * kBlock * kBlock : 0);
      gradients_.emplace_back(wanted ? blocks_ * kBlock * stages_[k].padded_dim() : 0);
    }
  }

  void run(Member member) {
    this->prepare(member, saved_);
    this->loops_.each(member, blocks_, [&](int64_t block) {
      for_wanted([&](int64_t k) {
        const int64_t elements = kBlock * stages_[k].padded_dim();
        std::fill_n(gradients_[k].data() + block * elements, elements, C(0));
      });
    });
    walk(
        member, this->loops_, blocks_, window_,
        [&](int64_t row, int64_t column, int64_t slot) { backward_block(member, row, column, slot); },
        [&](int64_t samples, int64_t other, int64_t slot, bool transposed) {
          for_wanted([&](int64_t k) {
            stages_[k].combine(derivative(k, slot, !transposed), this->count(samples), other,
                               gradients_[k].data() + samples * kBlock * stages_[k].padded_dim());
          });
        });
    this->loops_.each(member, blocks_, [&](int64_t block) {
      for_wanted([&](int64_t k) {
        for (int64_t i = block * kBlock; i < block * kBlock + this->count(block); ++i) {
          stages_[k].finish(i, gradients_[k].data() + i * stages_[k].padded_dim(), loss_.similarities, spec_.eps, grad_,
                            outs_[k]);
        }
      });
    });
  }

 private:
  using Base = Group<C, D>;
  using Base::blocks_, Base::loss_, Base::spec_, Base::samples_, Base::window_, Base::stages_, Base::students_;

  template <class Call>
  void for_wanted(const Call& call) {
    for (int64_t k = 0; k <= students_; ++k) {
      if (outs_[k].data) call(k);
    }
  }

  C* derivative(int64_t stage, int64_t slot, bool transposed) {
    return derivatives_[stage].data() + (slot * 2 + transposed) * kBlock * kBlock;
  }

  void backward_block(Member member, int64_t row, int64_t column, int64_t slot) {
    C *t = this->workspace(member, 0), *s = this->workspace(member, 1);
    const bool teacher = outs_[students_].data;
    stages_[students_].multiply(row, column, t);
    for_wanted([&](int64_t k) { std::fill_n(derivative(k, slot, false), kBlock * kBlock, C(0)); });
    for (int64_t student = 0; student < students_; ++student) {
      if (!teacher && !outs_[student].data) continue;
      stages_[student].multiply(row, column, s);
      if (outs_[student].data)
        add_derivative(this->rows_.student, s, t, row, column, student, derivative(student, slot, false));
      if (teacher) add_derivative(this->rows_.teacher, s, t, row, column, student, derivative(students_, slot, false));
    }
    for_wanted([&](int64_t k) {
      C* g = derivative(k, slot, false);
      if (row == column && !loss_.diagonal) {
        for (int64_t i = 0; i < kBlock; ++i) g[i * kBlock + i] = 0;
      }
      kernels().template products<C>().transpose(g, derivative(k, slot, true));
    });
  }

  void add_derivative(typename RowKernels<C>::Backward add, const C* s, const C* t, int64_t row, int64_t column,
                      int64_t student, C* g) {
    const C* statistics = saved_ + (students_ + 1 + student * kMaxStatistics) * samples_;
    for (int64_t i = 0; i < this->count(row); ++i) {
      C own[kMaxStatistics];
      for (int k = 0; k < kMaxStatistics; ++k) own[k] = statistics[k * samples_ + row * kBlock + i];
      add(this->arguments_, this->row(s, i), this->row(t, i), 0, this->count(column), own,
          {statistics + column * kBlock, samples_}, static_cast<C>(spec_.weights[student]), g + i * kBlock);
    }
  }

  const std::vector<Features>& outs_;
  const C* saved_;
  C grad_;
  std::vector<Buffer<C>> derivatives_;  // (window, window, 2, kBlock, kBlock), each block and its transpose
  std::vector<Buffer<C>> gradients_;    // with respect to the panels, (samples, padded features)
};

int64_t work_of(const std::vector<Features>& stages, Shape shape) {
  int64_t dim = 0;
  for (const Features& stage : stages) dim += stage.dim;
  return shape.samples * shape.samples * dim;
}

}  // namespace

template <class C>
void distill_streamed(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved) {
  const int threads = threads_for(work_of(stages, shape));
  with_loss(spec.loss, [&](auto tag) {
    for (int64_t group = 0; group < shape.groups; ++group) {
      Forward<C, decltype(tag)::template Of> pass(stages, group, shape, spec, threads);
      in_parallel(threads, [&](Member member) { pass.run(member); });
      loss[group] = pass.loss();
      if (saved) pass.save(saved + group * streamed_elements(stages.size(), shape.samples));
    }
  });
}

template <class C>
void distill_streamed_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                               const std::vector<Features>& outs, Shape shape, const Spec& spec) {
  const int threads = threads_for(work_of(stages, shape));
  with_loss(spec.loss, [&](auto tag) {
    for (int64_t group = 0; group < shape.groups; ++group) {
      const C* of_group = saved + group * streamed_elements(stages.size(), shape.samples);
      Backward<C, decltype(tag)::template Of> pass(stages, outs, group, shape, spec, of_group, grad[group], threads);
      in_parallel(threads, [&](Member member) { pass.run(member); });
    }
  });
}

#define ICSD_INSTANTIATE(C)                                                                    \
  template void distill_streamed<C>(const std::vector<Features>&, Shape, const Spec&, C*, C*); \
  template void distill_streamed_backward<C>(const C*, const C*, const std::vector<Features>&, \
                                             const std::vector<Features>&, Shape, const Spec&);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cpu
