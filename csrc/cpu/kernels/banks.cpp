// The kernels of bank_kernels.h. Compiled once for each instruction set, with ICSD_ISA its namespace.
#include <algorithm>
#include <cmath>

#include "cpu/kernels/bank_kernels.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/simd.h"

namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

// Calls work(s, t, end) for pairs of vectors of student and teacher, which it replaces. Zeros fill the last ones, from
// the element `end` on; the others have end = kLanes.
template <class C, class Work>
void for_vectors(C* s, C* t, int64_t count, const Work& work) {
  int64_t j = 0;
  for (; j + kLanes<C> <= count; j += kLanes<C>) {
    Vector<C> of_s = load(s + j), of_t = load(t + j);
    work(of_s, of_t, kLanes<C>);
    store(s + j, of_s);
    store(t + j, of_t);
  }
  if (const int64_t rest = count - j; rest > 0) {
    Vector<C> of_s = load_partial<C>(s + j, rest), of_t = load_partial<C>(t + j, rest);
    work(of_s, of_t, rest);
    store_partial(s + j, of_s, rest);
    store_partial(t + j, of_t, rest);
  }
}

// Returns the first `count` elements and zeros after them.
template <class C>
Vector<C> first_of(Vector<C> v, int64_t count) {
  if (count == kLanes<C>) return v;
  C elements[kLanes<C>];
  store(elements, v);
  return load_partial<C>(elements, count);
}

// Returns the largest of some numbers and `least`. NaN counts as none of them.
template <class C>
C largest(const C* x, int64_t count, C least) {
  Vector<C> lanes = Vector<C>{} + least;
  int64_t j = 0;
  for (; j + kLanes<C> <= count; j += kLanes<C>) {
    const Vector<C> v = load(x + j);
    lanes = v > lanes ? v : lanes;
  }
  for (int lane = 0; lane < kLanes<C>; ++lane) least = std::max(least, lanes[lane]);
  for (; j < count; ++j) least = std::max(least, x[j]);
  return least;
}

template <class C>
void raise_top(BankRow<C>& row, C top_s, C top_t) {
  const C rise_s = top_s - row.top_s, rise_t = top_t - row.top_t, shrink_t = std::exp(-rise_t);
  row.weighted = shrink_t * (row.weighted + row.sum_t * (rise_s - rise_t));
  row.sum_s *= std::exp(-rise_s);
  row.sum_t *= shrink_t;
  row.top_s = top_s;
  row.top_t = top_t;
}

template <class C>
void forward(C* s, C* t, int64_t count, bool rising, BankRow<C>* result) {
  using V = Vector<C>;
  BankRow<C> row = *result;
  if (rising) raise_top(row, largest(s, count, row.top_s), largest(t, count, row.top_t));
  V sum_s{}, sum_t{}, weighted{};
  for_vectors(s, t, count, [&](V& of_s, V& of_t, int64_t end) {
    const V below_s = of_s - row.top_s, below_t = of_t - row.top_t;
    of_s = first_of<C>(Math<V>::exp(below_s), end);
    of_t = first_of<C>(Math<V>::exp(below_t), end);
    sum_s += of_s;
    sum_t += of_t;
    weighted += of_t * (below_t - below_s);
  });
  row.sum_s += sum(sum_s);
  row.sum_t += sum(sum_t);
  row.weighted += sum(weighted);
  *result = row;
}

template <class C>
void backward(C* s, C* t, int64_t count, const BankRow<C>& row, C factor_s, C factor_t) {
  using V = Vector<C>;
  const C inverse_s = 1 / row.sum_s, inverse_t = 1 / row.sum_t, mean = row.weighted * inverse_t;
  for_vectors(s, t, count, [&](V& of_s, V& of_t, int64_t) {
    const V below_s = of_s - row.top_s, below_t = of_t - row.top_t;
    const V p = Math<V>::exp(below_s) * inverse_s, q = Math<V>::exp(below_t) * inverse_t;
    of_s = factor_s * (p - q);
    of_t = factor_t * q * (below_t - below_s - mean);
  });
}

}  // namespace

extern const BankKernels<float> banks_float = {forward<float>, backward<float>};
extern const BankKernels<double> banks_double = {forward<double>, backward<double>};

}  // namespace icsd::cpu::ICSD_ISA
