#include "cpu/sample.h"

#include "cpu/kernels/combine.h"
#include "cpu/kernels/gram.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/threads.h"

namespace icsd::cpu {
namespace {

// Returns the number of multiply-adds of one pass over the stages.
int64_t work_of(const std::vector<Features>& stages, Shape shape) {
  int64_t dim = 0;
  for (const Features& stage : stages) dim += stage.dim;
  return shape.groups * shape.samples * shape.samples * dim;
}

// Computes some groups by all threads. Without `save`, the matrices of the gradients are not made. `next` are the
// features of the first stage of the group that comes after these, or null.
template <class C, template <class> class D>
void distill_groups(const std::vector<Features>& stages, const std::vector<Matrices<C>>& matrices, Shape shape,
                    const Spec& spec, C* loss, bool save, int threads, const void* next = nullptr) {
  Grams<C> grams(stages, matrices, shape, threads, spec.center, next);
  LossRows<C, D> loss_rows(stages, matrices, shape, spec);
  in_parallel(threads, [&](Member member) {
    grams.accumulate(member);
    member.barrier();
    grams.finish(member);
    loss_rows.normalize(member);  // needs only the diagonal, of rows that this thread finished
    member.barrier();
    loss_rows.choose(member);
    loss_rows.forward(member);
    member.barrier();
    const Range groups = split_of(shape.groups, member.thread, member.threads);
    for (int64_t group = groups.begin; group < groups.end; ++group) loss[group] = loss_rows.loss(group);
    if (!save) return;
    loss_rows.backward(member);
    if (!spec.center) return;
    member.barrier();
    loss_rows.center(member);
  });
}

// With many groups, each is computed by one thread from beginning to end: its matrices stay in the cache, and no thread
// waits for another one.
template <class C, template <class> class D>
void distill_with(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved) {
  constexpr int64_t kGroups = 4;  // for each thread, so that all of them have about as much work
  const int64_t n = shape.samples, matrix_size = n * (n + 1), count = static_cast<int64_t>(stages.size());
  const int threads = threads_for(work_of(stages, shape));
  const bool one_by_one = shape.groups > 1 && (threads == 1 || shape.groups >= kGroups * threads);
  const int64_t at_once = one_by_one ? threads : shape.groups;  // groups that need a workspace
  Buffer<C> workspace(saved ? 0 : count * at_once * matrix_size);
  const auto matrices_of = [&](int64_t group, int thread) {
    std::vector<Matrices<C>> matrices;
    for (int64_t stage = 0; stage < count; ++stage) {
      C* const data = saved ? saved + (stage * shape.groups + group) * matrix_size
                            : workspace.data() + (stage * at_once + thread) * matrix_size;
      matrices.push_back({data, n + 1, matrix_size});
    }
    return matrices;
  };
  if (!one_by_one) {
    distill_groups<C, D>(stages, matrices_of(0, 0), shape, spec, loss, saved, threads);
    return;
  }
  Queue groups(shape.groups, threads);
  in_parallel(threads, [&](Member member) {
    groups.each(member, [&](int64_t group) {
      std::vector<Features> of_group = stages;
      for (Features& stage : of_group) stage.data = at(stage, group, 0, 0);
      const void* const next = group + 1 < shape.groups ? at(stages[0], group + 1, 0, 0) : nullptr;
      distill_groups<C, D>(of_group, matrices_of(group, member.thread), {1, n}, spec, loss + group, saved, 1, next);
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
  const int threads = threads_for(shape.groups * outputs * shape.samples * x.dim);
  combine_all<C>({{matrix, shape.samples, outputs * shape.samples, outputs, nullptr, nullptr, x, out}}, shape, threads);
}

template <class C>
void distill_sample(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved) {
  with_loss(spec.loss,
            [&](auto tag) { distill_with<C, decltype(tag)::template Of>(stages, shape, spec, loss, saved); });
}

template <class C>
void distill_sample_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                             const std::vector<Features>& outs, Shape shape) {
  const int64_t n = shape.samples, matrix_size = n * (n + 1);
  std::vector<Product<C>> products;
  std::vector<Features> wanted;
  for (std::size_t stage = 0; stage < outs.size(); ++stage) {
    if (!outs[stage].data) continue;
    const C* matrix = saved + stage * shape.groups * matrix_size;
    products.push_back({matrix, n + 1, matrix_size, n, matrix + n, grad, stages[stage], outs[stage]});
    wanted.push_back(stages[stage]);
  }
  combine_all(products, shape, threads_for(work_of(wanted, shape)));
}

#define ICSD_INSTANTIATE(C)                                                                  \
  template void gram<C>(const Features&, Shape, C*);                                         \
  template void combine<C>(const C*, int64_t, const Features&, const Features&, Shape);      \
  template void distill_sample<C>(const std::vector<Features>&, Shape, const Spec&, C*, C*); \
  template void distill_sample_backward<C>(const C*, const C*, const std::vector<Features>&, \
                                           const std::vector<Features>&, Shape);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cpu
