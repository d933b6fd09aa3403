// The kernels of row_kernels.h. Compiled once for each instruction set, with ICSD_ISA its namespace.
#include "cpu/kernels/row_kernels.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/shifted_kl.h"
#include "cpu/runtime/simd.h"

namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

template <class C>
Vector<C> similarity(SimilarityRow<C> row, int64_t j) {
  return load(row.gram + j) * (row.own * load(row.inverse_norms + j));
}
template <class C>
Vector<C> similarity(SimilarityRow<C> row, int64_t j, int64_t count) {
  return load_partial<C>(row.gram + j, count) * (row.own * load_partial<C>(row.inverse_norms + j, count));
}
template <class C>
C similarity_at(SimilarityRow<C> row, int64_t j) {
  return row.gram[j] * (row.own * row.inverse_norms[j]);
}

// Adds the lanes' parts of a row to it.
template <class C, class Loss, class Lanes, class Row>
void merge_lanes(const Loss& loss, const Lanes& lanes, Row& row) {
  constexpr int kFields = sizeof(Row) / sizeof(C);
  C fields[kFields][kLanes<C>];
  std::memcpy(fields, &lanes, sizeof lanes);
  for (int lane = 0; lane < kLanes<C>; ++lane) {
    Row one;
    C* to = reinterpret_cast<C*>(&one);
    for (int field = 0; field < kFields; ++field) to[field] = fields[field][lane];
    loss.merge(row, one);
  }
}

// The exponentials of all lanes become relative to the same largest ones by few vector operations, and can be added.
template <class C>
void merge_lanes(const Kl<C>& loss, typename Kl<C>::template Row<Vector<C>> lanes,
                 typename Kl<C>::template Row<C>& row) {
  typename Kl<C>::template Row<C> one;
  for (int lane = 0; lane < kLanes<C>; ++lane) {
    one.max_s = std::max(one.max_s, lanes.max_s[lane]);
    one.max_t = std::max(one.max_t, lanes.max_t[lane]);
  }
  loss.raise(lanes, Vector<C>{} + one.max_s, Vector<C>{} + one.max_t);
  one.sum_s = sum(lanes.sum_s);
  one.sum_t = sum(lanes.sum_t);
  one.weighted = sum(lanes.weighted);
  loss.merge(row, one);
}

template <class C, template <class> class D>
void forward(LossArguments<C> arguments, SimilarityRow<C> s, SimilarityRow<C> t, int64_t begin, int64_t end,
             void* result) {
  using V = Vector<C>;
  using Row = typename D<C>::template Row<C>;
  using Lanes = typename D<C>::template Row<V>;
  const D<C> loss(arguments);
  Lanes lanes;
  int64_t j = begin;
  for (; j + kLanes<C> <= end; j += kLanes<C>) loss.update(lanes, similarity(s, j), similarity(t, j));
  Row row = *static_cast<Row*>(result);
  if (j > begin) merge_lanes<C>(loss, lanes, row);
  for (; j < end; ++j) loss.update(row, similarity_at(s, j), similarity_at(t, j));
  *static_cast<Row*>(result) = row;
}

// The end of a row goes through vectors too: of a loop over single elements the compiler makes two versions that round
// differently, and the addresses decide between them.
template <class C, template <class> class D, bool kTeacher>
void backward(LossArguments<C> arguments, SimilarityRow<C> s, SimilarityRow<C> t, int64_t begin, int64_t end,
              const C* own, Statistics<C> others, C weight, C* g) {
  using V = Vector<C>;
  constexpr int kCount = D<C>::kStatistics;
  const D<C> loss(arguments);
  V own_lanes[kCount + 1], other_lanes[kCount + 1];
  for (int k = 0; k < kCount; ++k) own_lanes[k] = V{} + own[k];
  const auto gradient = [&](V similarity, V target) {
    if constexpr (kTeacher) {
      return loss.teacher(similarity, target, own_lanes, other_lanes);
    } else {
      return loss.student(similarity, target, own_lanes, other_lanes);
    }
  };
  int64_t j = begin;
  for (; j + kLanes<C> <= end; j += kLanes<C>) {
    for (int k = 0; k < kCount; ++k) other_lanes[k] = load(others.data + k * others.stride + j);
    store(g + j, load(g + j) + weight * gradient(similarity(s, j), similarity(t, j)));
  }
  if (const int64_t count = end - j; count > 0) {
    for (int k = 0; k < kCount; ++k) other_lanes[k] = load_partial<C>(others.data + k * others.stride + j, count);
    const V value = gradient(similarity(s, j, count), similarity(t, j, count));
    store_partial(g + j, load_partial<C>(g + j, count) + weight * value, count);
  }
}

template <class C>
C project(SimilarityRow<C> s, const C* g, int64_t begin, int64_t end, C* a) {
  Vector<C> lanes{};
  int64_t j = begin;
  for (; j + kLanes<C> <= end; j += kLanes<C>) {
    const Vector<C> value = load(g + j);
    lanes += value * similarity(s, j);
    store(a + j, value * load(s.inverse_norms + j));
  }
  if (const int64_t count = end - j; count > 0) {
    const Vector<C> value = load_partial<C>(g + j, count);
    lanes += value * similarity(s, j, count);
    store_partial(a + j, value * load_partial<C>(s.inverse_norms + j, count), count);
  }
  return sum(lanes);
}

// Calls work(j, count) for whole vectors and for what is left.
template <class Work>
void for_vectors(int64_t begin, int64_t end, const Work& work) {
  for (int64_t j = begin; j < end; j += kLanes<float>) work(j, std::min<int64_t>(kLanes<float>, end - j));
}

FloatVector load_up_to(const float* p, int64_t count) {
  return count == kLanes<float> ? load(p) : load_partial<float>(p, count);
}

// Stores bfloat16 numbers next to `values` and returns them.
FloatVector store_rounded(float* to, FloatVector values, int64_t count) {
  bfloat16 narrow[kLanes<float>];
  store(narrow, values);
  const FloatVector rounded = load(narrow);
  if (count == kLanes<float>) {
    store(to, rounded);
  } else {
    store_partial(to, rounded, count);
  }
  return rounded;
}

// g_j S_j = own a_j K_j, in which g_j is as it would be if a_j had not been rounded but g_j so that a_j needs none.
float project_narrow(SimilarityRow<float> s, const float* g, int64_t begin, int64_t end, float* a) {
  FloatVector lanes{};
  for_vectors(begin, end, [&](int64_t j, int64_t count) {
    const FloatVector k = load_up_to(s.gram + j, count);  // in the place of a_j
    lanes += k * store_rounded(a + j, load_up_to(g + j, count) * load_up_to(s.inverse_norms + j, count), count);
  });
  return s.own * sum(lanes);
}

template <class C, template <class> class D>
constexpr RowKernels<C> kernels_of = {forward<C, D>, backward<C, D, false>, backward<C, D, true>};

#define ICSD_LOSS(name, Loss) kernels_of<C, Loss>,
template <class C>
constexpr AllRowKernels<C> all_of(ProjectKernel<C> project_narrow) {
  return {{ICSD_LOSSES(ICSD_LOSS)}, kernels_of<C, ShiftedKl>, project<C>, project_narrow};
}
#undef ICSD_LOSS

}  // namespace

extern const AllRowKernels<float> rows_float = all_of<float>(project_narrow);
extern const AllRowKernels<double> rows_double = all_of<double>(nullptr);

}  // namespace icsd::cpu::ICSD_ISA
