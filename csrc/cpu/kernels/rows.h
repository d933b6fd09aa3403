// The losses and their gradients from Gram matrices by all threads of a parallel region. rows.cpp has the kernels that
// each of them runs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "core/features.h"
#include "core/spec.h"
#include "cpu/kernels/gram.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/norms.h"
#include "cpu/kernels/shifted_kl.h"
#include "cpu/runtime/threads.h"

namespace icsd::cpu {

// Computes one loss from Gram matrices and replaces these by the matrices of the gradients. The threads of a parallel
// region call `normalize`, `forward` and `backward`, with barriers between, and then `center` if the Gram matrices are
// those of centered samples.
template <class C, template <class> class D>
class LossRows {
 public:
  LossRows(const std::vector<Features>& inputs, const std::vector<Matrices<C>>& grams, Shape shape, const Spec& spec)
      : inputs_(inputs),
        grams_(grams),
        shape_(shape),
        spec_(spec),
        students_(static_cast<int64_t>(grams.size()) - 1),
        loss_(arguments()),
        kernels_(shape.groups, &kernels().template rows<C>().of[static_cast<int>(spec.loss)]),
        inverse_norms_(grams.size() * shape.groups * shape.samples),
        rows_(students_ * shape.groups * shape.samples),
        statistics_(D<C>::kStatistics * rows_.size()),
        means_(spec.center ? inverse_norms_.size() : 0) {}

  void normalize(Member member) {
    const Range range = split_of(static_cast<int64_t>(inverse_norms_.size()), member.thread, member.threads);
    for (int64_t item = range.begin; item < range.end; ++item) {
      const auto [stage, group, i] = locate(item);
      inverse_norms_[item] = loss_.similarities ? inverse_norm(grams_[stage].row(group, i)[i], spec_.eps) : 1;
    }
  }

  // Chooses the kernels of each group, where there is a choice.
  void choose(Member member) {
    if (!ShiftedKl<C>::takes(spec_) || shape_.samples == 1) return;  // the loss of one sample is 0, without rounding
    const Range groups = split_of(shape_.groups, member.thread, member.threads);
    for (int64_t group = groups.begin; group < groups.end; ++group) {
      if (has_norms(group)) kernels_[group] = &kernels().template rows<C>().shifted_kl;
    }
    member.barrier();
  }

  void forward(Member member) {
    const int64_t n = shape_.samples;
    const Range range = split_of(static_cast<int64_t>(rows_.size()), member.thread, member.threads);
    for (int64_t item = range.begin; item < range.end; ++item) {
      const auto [student, group, i] = locate(item);
      const SimilarityRow<C> s = similarity_row(student, group, i), t = similarity_row(students_, group, i);
      Row row;
      if (loss_.diagonal) {
        kernels_[group]->forward(arguments(), s, t, 0, n, &row);
      } else {
        kernels_[group]->forward(arguments(), s, t, 0, i, &row);
        kernels_[group]->forward(arguments(), s, t, i + 1, n, &row);
      }
      rows_[item] = row;
      C numbers[kMaxStatistics];
      loss_.statistics(row, numbers);
      for (int k = 0; k < D<C>::kStatistics; ++k) statistics_[k * rows_.size() + item] = numbers[k];
    }
  }

  C loss(int64_t group) const {
    double loss = 0;
    for (int64_t student = 0; student < students_; ++student) {
      double sum = 0;
      for (int64_t i = 0; i < shape_.samples; ++i) sum += loss_.value(rows_[index(student, group, i)]);
      loss += spec_.weights[student] * sum;
    }
    return static_cast<C>(loss);
  }

  void backward(Member member) {
    const int64_t n = shape_.samples;
    const Range range = split_of(shape_.groups * n, member.thread, member.threads);
    std::vector<C> for_student(n), for_teacher(n);
    for (int64_t item = range.begin; item < range.end; ++item) {
      const int64_t group = item / n, i = item % n;
      const SimilarityRow<C> t = similarity_row(students_, group, i);
      std::fill(for_teacher.begin(), for_teacher.end(), C(0));
      for (int64_t student = 0; student < students_; ++student) {
        const SimilarityRow<C> s = similarity_row(student, group, i);
        const C weight = static_cast<C>(spec_.weights[student]);
        const Statistics<C> others{statistics_.data() + index(student, group, 0), static_cast<int64_t>(rows_.size())};
        C own[kMaxStatistics];
        for (int k = 0; k < D<C>::kStatistics; ++k) own[k] = others.data[k * others.stride + i];
        std::fill(for_student.begin(), for_student.end(), C(0));
        const RowKernels<C>& kernels = *kernels_[group];
        kernels.student(arguments(), s, t, 0, n, own, others, weight, for_student.data());
        if (spec_.teacher_gradient) kernels.teacher(arguments(), s, t, 0, n, own, others, weight, for_teacher.data());
        write_row(student, group, i, for_student);
      }
      if (spec_.teacher_gradient) {
        write_row(students_, group, i, for_teacher);
      } else {
        grams_[students_].row(group, i)[n] = inverse_norms_[index(students_, group, i)];
      }
    }
  }

  // Replaces the symmetric matrices M by H M H. Their rows sum to 0: the diagonal is made so that they do after
  // rounding, too, because the product with the features would multiply what is left by the mean sample.
  void center(Member member) {
    const int64_t n = shape_.samples, stages = students_ + spec_.teacher_gradient;
    const Range range = split_of(stages * shape_.groups * n, member.thread, member.threads);
    for (int64_t item = range.begin; item < range.end; ++item) {
      const auto [stage, group, i] = locate(item);
      const C* means = means_.data() + index(stage, group, 0);
      C* a = grams_[stage].row(group, i);
      const C shift = means[i] - std::accumulate(means, means + n, C(0)) / n;
      for (int64_t j = 0; j < n; ++j) a[j] = (a[j] - means[j]) - shift;
      a[i] = 0;
      a[i] = -std::accumulate(a, a + n, C(0));
    }
  }

 private:
  // Tells whether every sample of a group is as similar to itself as can be: not 0, not NaN, and no shorter than eps.
  bool has_norms(int64_t group) const {
    const C most = 1 / static_cast<C>(spec_.eps);
    for (int64_t stage = 0; stage <= students_; ++stage) {
      const C* const r = inverse_norms_.data() + index(stage, group, 0);
      if (!std::all_of(r, r + shape_.samples, [&](C inverse) { return inverse > 0 && inverse < most; })) return false;
    }
    return true;
  }

  using Row = typename D<C>::template Row<C>;

  struct Location {
    int64_t stage, group, sample;
  };
  Location locate(int64_t item) const {
    return {item / shape_.samples / shape_.groups, item / shape_.samples % shape_.groups, item % shape_.samples};
  }
  int64_t index(int64_t stage, int64_t group, int64_t i) const {
    return (stage * shape_.groups + group) * shape_.samples + i;
  }

  SimilarityRow<C> similarity_row(int64_t stage, int64_t group, int64_t i) const {
    const C* r = inverse_norms_.data() + index(stage, group, 0);
    return {grams_[stage].row(group, i), r, r[i]};
  }

  // Tells whether A gets bfloat16 numbers off its diagonal, for NarrowKernels. Rounding g before it is projected leaves
  // each term g_j (x̂_j - S_ij x̂_i) of the gradient off by no more than its own rounding, however alike the samples are.
  // H M H has no such terms left that could be rounded one by one, so it stays as it is.
  bool is_narrow(int64_t stage) const {
    return kernels().narrow && sizeof(C) == sizeof(float) && inputs_[stage].dtype == DType::bfloat16 && !spec_.center;
  }

  LossArguments<C> arguments() const {
    return {spec_.parameters.data(), static_cast<C>(shape_.samples), static_cast<C>(spec_.eps)};
  }

  // Writes row i of A and r from g_j = dL/dS_ij + dL/dS_ji. The diagonal has the projection on x_i, except where eps
  // replaces the norm or the loss is of products.
  void write_row(int64_t stage, int64_t group, int64_t i, std::vector<C>& g) {
    const int64_t n = shape_.samples;
    const SimilarityRow<C> s = similarity_row(stage, group, i);
    C* a = grams_[stage].row(group, i);
    if (!loss_.diagonal) g[i] = 0;
    const C own = a[i];
    const bool projected = loss_.similarities && !is_clamped(own, spec_.eps);
    const bool narrow = projected && is_narrow(stage);
    const auto& rows = kernels().template rows<C>();
    const C projection = (narrow ? rows.project_narrow : rows.project)(s, g.data(), 0, n, a);
    const C on_diagonal = narrow ? s.own * (a[i] * own) : g[i] * (own * (s.own * s.own));
    if (projected) a[i] = -(projection - on_diagonal) * s.own;
    a[n] = s.own;
    if (spec_.center) {
      for (int64_t j = 0; j < n; ++j) a[j] *= s.own;
      means_[index(stage, group, i)] = std::accumulate(a, a + n, C(0)) / n;
      a[n] = 1;
    }
  }

  const std::vector<Features>& inputs_;
  const std::vector<Matrices<C>>& grams_;
  Shape shape_;
  const Spec& spec_;
  int64_t students_;
  D<C> loss_;
  std::vector<const RowKernels<C>*> kernels_;  // of each group
  std::vector<C> inverse_norms_;
  std::vector<Row> rows_;
  std::vector<C> statistics_;  // one array for each number, over all rows
  std::vector<C> means_;       // of the rows of M, if samples are centered
};

}  // namespace icsd::cpu
