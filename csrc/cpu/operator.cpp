#include "cpu/operator.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/threads.h"

namespace icsd::cpu {
namespace {

using std::int64_t;

// Multiply-adds of one pass over the stages.
int64_t work_of(const std::vector<Features>& stages, Shape shape) {
  int64_t features = 0;
  for (const Features& stage : stages) features += stage.features;
  return shape.groups * shape.samples * shape.samples * features;
}

// Gram matrices, rows `stride` apart and groups `group_stride`, both halves of each.
template <class C>
struct Matrices {
  C* data;
  int64_t stride, group_stride;

  C* row(int64_t group, int64_t i) const { return data + group * group_stride + i * stride; }
};

// The Gram matrices of all stages and groups, by the threads of one parallel region: each thread calls `accumulate`,
// then, after a barrier, `finish`.
//
// Few samples: the threads share the features out and their sums are added up in a fixed order.
// Several groups: they share blocks of the matrices out, and nothing is left to add.
// Many samples: so they do, and lay a few features of all samples out at a time, for each block to be used many times.
template <class C>
class Grams {
 public:
  Grams(const std::vector<Features>& stages, const std::vector<Matrices<C>>& out, Shape shape, int threads)
      : stages_(stages),
        out_(out),
        shape_(shape),
        threads_(threads),
        matrices_(static_cast<int64_t>(stages.size()) * shape.groups),
        split_features_(threads > 1 && shape.samples <= kMaxSplit && shape.groups < 4 * threads),
        side_(split_features_ ? shape.samples : std::min(shape.samples, kSide)),
        sides_(blocks_of(shape.samples, kSide)),
        blocks_(matrices_ * (sides_ * (sides_ + 1) / 2), threads),
        sums_((split_features_ ? matrices_ * threads : threads) * side_ * side_),
        loops_(threads),
        panels_(lays_out() ? blocks_of(shape.samples, kBlock) * kBlock * kFeatures : 0),
        products_(lays_out() ? threads * 2 * kBlock * kBlock : 0) {}

  void accumulate(Member member) {
    if (lays_out()) {
      for (int64_t matrix = 0; matrix < matrices_; ++matrix) multiply(member, matrix);
      return;
    }
    if (split_features_) {
      for (int64_t matrix = 0; matrix < matrices_; ++matrix) {
        const int64_t features = stages_[matrix / shape_.groups].features;
        const Range lines = part(blocks_of(features, kLine), member.thread, member.threads);
        add_block(matrix, {0, side_, 0, side_}, {lines.begin * kLine, std::min(lines.end * kLine, features)},
                  partial(matrix, member.thread));
      }
      return;
    }
    double* sums = sums_.data() + member.thread * side_ * side_;
    blocks_.each(member, [&](int64_t item) {
      const int64_t per_matrix = sides_ * (sides_ + 1) / 2, matrix = item / per_matrix;
      const auto [row, column] = in_triangle(item % per_matrix);
      const GramBlock block{row * kSide, std::min((row + 1) * kSide, shape_.samples), column * kSide,
                            std::min((column + 1) * kSide, shape_.samples)};
      std::fill_n(sums, side_ * side_, 0.0);
      add_block(matrix, block, {0, stages_[matrix / shape_.groups].features}, sums);
      for (int64_t i = block.row_begin; i < block.row_end; ++i) {
        for (int64_t j = block.column_begin; j < std::min(block.column_end, i + 1); ++j) {
          put(matrix, i, j, sums[(i - block.row_begin) * side_ + (j - block.column_begin)]);
        }
      }
    });
  }

  void finish(Member member) {
    if (!split_features_) return;
    const int64_t n = shape_.samples;
    const Range rows = part(matrices_ * n, member.thread, member.threads);
    for (int64_t item = rows.begin; item < rows.end; ++item) {
      const int64_t matrix = item / n, i = item % n;
      for (int64_t j = 0; j <= i; ++j) {
        double sum = 0;
        for (int owner = 0; owner < member.threads; ++owner) sum += partial(matrix, owner)[i * n + j];
        put(matrix, i, j, sum);
      }
    }
  }

 private:
  static constexpr int64_t kMaxSplit = 512;  // samples up to which the features are shared out
  static constexpr int64_t kSide = 128;      // side of a block of the matrix
  static constexpr int64_t kLine = 64;       // threads' shares begin on whole cache lines of features
  static constexpr int64_t kFeatures = 1024;  // laid out at a time

  bool lays_out() const { return matrices_ > 0 && shape_.samples > kMaxSplit; }

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
    const auto& tiles = kernels().template tiles<C>();
    C *product = products_.data() + member.thread * 2 * kBlock * kBlock, *transposed = product + kBlock * kBlock;
    for (int64_t k = 0; k == 0 || k < x.features; k += kFeatures) {
      const int64_t features = std::min(kFeatures, x.features - k);
      const Panels<C> panels{panels_.data(), tiles.panel, tiles.panel, tiles.panel * features};
      loops_.each(member, blocks, [&](int64_t block) {
        tiles.by_sample[static_cast<int>(x.dtype)](at(x, group, block * kBlock, k), x.sample_stride,
                                                   std::min(kBlock, n - block * kBlock), features, nullptr,
                                                   panels_.data() + block * kBlock * features, panels.panel_stride);
      });
      loops_.each(member, blocks * (blocks + 1) / 2, [&](int64_t item) {
        const auto [row, column] = in_triangle(item);
        const int64_t top = row * kBlock, left = column * kBlock;
        const int64_t rows = std::min(kBlock, n - top), columns = std::min(kBlock, n - left);
        const bool diagonal = row == column;
        const int64_t width = diagonal ? tiles.panel : columns;  // what is above the diagonal is left out
        for (int64_t j = 0; j < columns; j += width) {
          const int64_t first = diagonal ? j : 0;
          tiles.multiply(panels.from(0, top + first), panels.from(0, left + j), rows - first, std::min(width, columns - j),
                         features, product + first * kBlock + j, kBlock, false);
        }
        for (int64_t i = 0; i < rows; ++i) {
          C *to = out_[matrix / shape_.groups].row(group, top + i) + left, *sums = product + i * kBlock;
          const int64_t count = diagonal ? i + 1 : columns;
          for (int64_t j = 0; j < count; ++j) to[j] = sums[j] += k ? to[j] : 0;
        }
        if (k + features < x.features) return;
        tiles.transpose(product, transposed);
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t first = diagonal ? j : 0;
          std::copy_n(transposed + j * kBlock + first, rows - first,
                      out_[matrix / shape_.groups].row(group, left + j) + top + first);
        }
      });
    }
  }

  double* partial(int64_t matrix, int thread) { return sums_.data() + (matrix * threads_ + thread) * side_ * side_; }

  void add_block(int64_t matrix, GramBlock block, Range features, double* sums) {
    const Features& x = stages_[matrix / shape_.groups];
    kernels().gram[static_cast<int>(x.dtype)](at(x, matrix % shape_.groups, 0, features.begin), x.sample_stride,
                                              features.end - features.begin, block, sums, side_);
  }

  void put(int64_t matrix, int64_t i, int64_t j, double value) {
    const Matrices<C>& out = out_[matrix / shape_.groups];
    out.row(matrix % shape_.groups, i)[j] = out.row(matrix % shape_.groups, j)[i] = static_cast<C>(value);
  }

  const std::vector<Features>& stages_;
  const std::vector<Matrices<C>>& out_;
  Shape shape_;
  int threads_;
  int64_t matrices_;
  bool split_features_;
  int64_t side_, sides_;
  Queue blocks_;
  std::vector<double> sums_;
  Loops loops_;
  Buffer<C> panels_, products_;
};

// From Gram matrices to the loss and, in place, to the gradients' matrices, for one loss. The threads of a parallel
// region call `normalize`, `measure` and `differentiate` with barriers between.
template <class C, template <class> class D>
class Epilogue {
 public:
  Epilogue(const std::vector<Features>& features, const std::vector<Matrices<C>>& stages, Shape shape,
           const Spec& spec)
      : features_(features),
        stages_(stages),
        shape_(shape),
        spec_(spec),
        students_(static_cast<int64_t>(stages.size()) - 1),
        loss_(arguments()),
        kernels_(kernels().template rows<C>().of[static_cast<int>(spec.loss)]),
        inverse_norms_(stages.size() * shape.groups * shape.samples),
        rows_(students_ * shape.groups * shape.samples),
        statistics_(D<C>::kStatistics * rows_.size()) {}

  void normalize(Member member) {
    const Range range = part(static_cast<int64_t>(inverse_norms_.size()), member.thread, member.threads);
    for (int64_t item = range.begin; item < range.end; ++item) {
      const auto [stage, group, i] = locate(item);
      inverse_norms_[item] = loss_.similarities ? inverse_norm(stages_[stage].row(group, i)[i], spec_.eps) : 1;
    }
  }

  void measure(Member member) {
    const int64_t n = shape_.samples;
    const Range range = part(static_cast<int64_t>(rows_.size()), member.thread, member.threads);
    for (int64_t item = range.begin; item < range.end; ++item) {
      const auto [student, group, i] = locate(item);
      const SimilarityRow<C> s = similarity_row(student, group, i), t = similarity_row(students_, group, i);
      Row row;
      if (loss_.diagonal) {
        kernels_.measure(arguments(), s, t, 0, n, &row);
      } else {
        kernels_.measure(arguments(), s, t, 0, i, &row);
        kernels_.measure(arguments(), s, t, i + 1, n, &row);
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

  void differentiate(Member member) {
    const int64_t n = shape_.samples;
    const Range range = part(shape_.groups * n, member.thread, member.threads);
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
        kernels_.student(arguments(), s, t, 0, n, own, others, weight, for_student.data());
        if (spec_.teacher_gradient) kernels_.teacher(arguments(), s, t, 0, n, own, others, weight, for_teacher.data());
        write_row(student, group, i, for_student);
      }
      if (spec_.teacher_gradient) {
        write_row(students_, group, i, for_teacher);
      } else {
        stages_[students_].row(group, i)[n] = inverse_norms_[index(students_, group, i)];
      }
    }
  }

 private:
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
    return {stages_[stage].row(group, i), r, r[i]};
  }

  // Whether A is to have bfloat16 numbers off its diagonal, for NarrowKernels. Rounding g before it is projected leaves
  // each term g_j (x̂_j - S_ij x̂_i) of the gradient off by no more than its own rounding, however alike the samples are.
  bool is_narrow(int64_t stage) const {
    return kernels().narrow && sizeof(C) == sizeof(float) && features_[stage].dtype == DType::bfloat16;
  }

  LossArguments<C> arguments() const {
    return {spec_.parameters.data(), static_cast<C>(shape_.samples), static_cast<C>(spec_.eps)};
  }

  // Row i of A and r, from g_j = dL/dS_ij + dL/dS_ji. The projection on x_i, on the diagonal, is absent where nothing or
  // eps stood in for the norm.
  void write_row(int64_t stage, int64_t group, int64_t i, std::vector<C>& g) {
    const int64_t n = shape_.samples;
    const SimilarityRow<C> s = similarity_row(stage, group, i);
    C* a = stages_[stage].row(group, i);
    if (!loss_.diagonal) g[i] = 0;
    const C own = a[i];
    const bool projected = loss_.similarities && !is_clamped(own, spec_.eps);
    const bool narrow = projected && is_narrow(stage);
    if (narrow) {
      for (int64_t j = 0; j < n; ++j) {
        const float r = s.inverse_norms[j];
        if (r != 0) g[j] = to_float(to_bfloat16(g[j] * r)) / r;
      }
    }
    const C on_diagonal = g[i] * (own * (s.own * s.own));
    const C projection = kernels().template rows<C>().project(s, g.data(), 0, n, a);
    if (narrow) {
      for (int64_t j = 0; j < n; ++j) a[j] = to_float(to_bfloat16(a[j]));
    }
    if (projected) a[i] = -(projection - on_diagonal) * s.own;
    a[n] = s.own;
  }

  const std::vector<Features>& features_;
  const std::vector<Matrices<C>>& stages_;
  Shape shape_;
  const Spec& spec_;
  int64_t students_;
  D<C> loss_;
  const RowKernels<C>& kernels_;
  std::vector<C> inverse_norms_;
  std::vector<Row> rows_;
  std::vector<C> statistics_;  // one array for each number, over all rows
};

template <class C, template <class> class D>
void distill_with(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* slots) {
  const int64_t n = shape.samples, slot = n * (n + 1);
  Buffer<C> scratch(slots ? 0 : stages.size() * shape.groups * slot);
  std::vector<Matrices<C>> matrices;
  for (std::size_t stage = 0; stage < stages.size(); ++stage) {
    matrices.push_back({(slots ? slots : scratch.data()) + stage * shape.groups * slot, n + 1, slot});
  }
  const int threads = threads_for(work_of(stages, shape));
  Grams<C> grams(stages, matrices, shape, threads);
  Epilogue<C, D> epilogue(stages, matrices, shape, spec);
  in_parallel(threads, [&](Member member) {
    grams.accumulate(member);
    member.barrier();
    grams.finish(member);
    epilogue.normalize(member);  // by the diagonal of the rows that this thread finished
    member.barrier();
    epilogue.measure(member);
    member.barrier();
    const Range groups = part(shape.groups, member.thread, member.threads);
    for (int64_t group = groups.begin; group < groups.end; ++group) loss[group] = epilogue.loss(group);
    if (slots) epilogue.differentiate(member);
  });
}

// One product of `combine`: a packed matrix for each group.
template <class C>
struct Product {
  const C* matrix;  // (groups, outputs, samples), rows `row_stride` apart, groups `group_stride`
  int64_t row_stride, group_stride, outputs;
  const C* row_scale;    // one for each output, `row_stride` apart, or null
  const C* group_scale;  // one for each group, or null
  Features x, out;
};

template <class C>
void combine_all(const std::vector<Product<C>>& products, Shape shape, int threads) {
  constexpr int64_t kLine = 64;    // shares begin on whole cache lines of features
  constexpr int64_t kShares = 8;   // shares of a group's features for each thread
  struct Job {
    const Product<C>* product;
    int64_t group;
    Buffer<char> packed;
    std::vector<double> scale;
    std::vector<float> rest;
    bool narrow;

    const C* matrix() const { return product->matrix + group * product->group_stride; }
  };
  std::vector<Job> jobs;
  for (const Product<C>& product : products) {
    for (int64_t group = 0; group < shape.groups; ++group) {
      std::int64_t bytes = product.outputs * shape.samples * (product.x.dtype == DType::float64 ? 8 : 4);
      if (kernels().narrow) bytes = std::max(bytes, kernels().narrow->bytes(shape.samples));
      jobs.push_back({&product, group, Buffer<char>(bytes), std::vector<double>(product.outputs),
                      std::vector<float>(product.outputs), false});
    }
  }
  const int64_t count = static_cast<int64_t>(jobs.size());
  const int64_t shares = threads == 1 ? 1 : std::max<int64_t>(1, kShares * threads / std::max<int64_t>(count, 1));
  Queue queue(count * shares, threads);
  in_parallel(threads, [&](Member member) {
    const Range range = part(count, member.thread, member.threads);
    for (int64_t item = range.begin; item < range.end; ++item) {
      Job& job = jobs[item];
      const Product<C>& p = *job.product;
      if constexpr (std::is_same_v<C, float>) {
        job.narrow = kernels().narrow && p.x.dtype == DType::bfloat16 && p.outputs == shape.samples &&
                     kernels().narrow->pack(job.matrix(), p.row_stride, shape.samples, job.packed.data(), job.rest.data());
      }
      for (int64_t i = 0; i < p.outputs; ++i) {
        const double row = p.row_scale ? p.row_scale[job.group * p.group_stride + i * p.row_stride] : C(1);
        job.scale[i] = row * (p.group_scale ? p.group_scale[job.group] : C(1));
      }
    }
    member.barrier();
    for (Job& job : jobs) {
      if (job.narrow) continue;
      const Product<C>& p = *job.product;
      kernels().template pack<C>(p.x.dtype)(job.matrix(), p.row_stride, p.outputs, shape.samples, member.thread,
                                            member.threads, job.packed.data());
    }
    member.barrier();
    queue.each(member, [&](int64_t item) {
      const Job& job = jobs[item / shares];
      const Product<C>& p = *job.product;
      const Range lines = part(blocks_of(p.x.features, kLine), static_cast<int>(item % shares), static_cast<int>(shares));
      const int64_t begin = lines.begin * kLine, end = std::min(lines.end * kLine, p.x.features);
      if (begin >= end) return;
      if (job.narrow) {
        kernels().narrow->combine(
            job.packed.data(), job.rest.data(), job.scale.data(), reinterpret_cast<const bfloat16*>(at(p.x, job.group, 0, begin)), p.x.sample_stride, shape.samples, end - begin,
            reinterpret_cast<bfloat16*>(at(p.out, job.group, 0, begin)), p.out.sample_stride);
        return;
      }
      kernels().combine[static_cast<int>(p.x.dtype)](
          job.packed.data(), job.scale.data(), at(p.x, job.group, 0, begin), p.x.sample_stride, shape.samples,
          end - begin, at(p.out, job.group, 0, begin), p.out.sample_stride, p.outputs);
    });
  });
}

}  // namespace

template <class C>
void gram(const Features& x, Shape shape, C* out) {
  const std::vector<Features> stages{x};
  const std::vector<Matrices<C>> matrices{{out, shape.samples, shape.samples * shape.samples}};
  const int threads = threads_for(work_of(stages, shape));
  Grams<C> grams(stages, matrices, shape, threads);
  in_parallel(threads, [&](Member member) {
    grams.accumulate(member);
    member.barrier();
    grams.finish(member);
  });
}

template <class C>
void combine(const C* matrix, int64_t outputs, const Features& x, const Features& out, Shape shape) {
  const int threads = threads_for(shape.groups * outputs * shape.samples * x.features);
  combine_all<C>({{matrix, shape.samples, outputs * shape.samples, outputs, nullptr, nullptr, x, out}}, shape, threads);
}

template <class C>
void distill_sample(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* slots) {
  with_loss(spec.loss, [&](auto tag) {
    distill_with<C, decltype(tag)::template Of>(stages, shape, spec, loss, slots);
  });
}

template <class C>
void distill_sample_backward(const C* grad, const C* slots, const std::vector<Features>& stages,
                      const std::vector<Features>& outs, Shape shape) {
  const int64_t n = shape.samples, slot = n * (n + 1);
  std::vector<Product<C>> products;
  std::vector<Features> wanted;
  for (std::size_t stage = 0; stage < outs.size(); ++stage) {
    if (!outs[stage].data) continue;
    const C* matrix = slots + stage * shape.groups * slot;
    products.push_back({matrix, n + 1, slot, n, matrix + n, grad, stages[stage], outs[stage]});
    wanted.push_back(stages[stage]);
  }
  combine_all(products, shape, threads_for(work_of(wanted, shape)));
}

#define ICSD_INSTANTIATE(C)                                                                                      \
  template void gram<C>(const Features&, Shape, C*);                                                             \
  template void combine<C>(const C*, int64_t, const Features&, const Features&, Shape);                          \
  template void distill_sample<C>(const std::vector<Features>&, Shape, const Spec&, C*, C*);                    \
  template void distill_sample_backward<C>(const C*, const C*, const std::vector<Features>&, const std::vector<Features>&, Shape);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cpu
