// The loss `kl` by fewer exponentials, for rows whose largest similarity is that of the sample to itself.
#pragma once

#include "core/losses.h"
#include "core/spec.h"

namespace icsd::cpu {

// The loss of core/losses.h, with 1 in the place of the largest similarity of every row. So nothing is searched for or
// rescaled, and p_ij and p_ji, which have sums of their own, share one exponential. Where the largest ones are far
// below 1, as for samples that are shorter than eps, that would lose digits.
template <class T>
struct ShiftedKl : Kl<T> {
  static constexpr double kMostInverse = 32;  // of a temperature: exponents are at least -64

  static bool takes(const Spec& spec) {
    return spec.loss == LossKind::kl && spec.parameters[2] != 0 && 1 / spec.parameters[0] <= kMostInverse &&
           1 / spec.parameters[1] <= kMostInverse;
  }

  using Kl<T>::Kl;
  using Kl<T>::scale;
  using Kl<T>::inverse_student;
  using Kl<T>::inverse_teacher;
  template <class V>
  using Row = typename Kl<T>::template Row<V>;

  template <class V>
  ICSD_HD V below(V similarity, T inverse_temperature) const {
    return (similarity - 1) * inverse_temperature;
  }
  template <class V>
  ICSD_HD void update(Row<V>& row, V s, V t) const {
    const V below_s = below(s, inverse_student), below_t = below(t, inverse_teacher), e = Math<V>::exp(below_t);
    row.max_s = row.max_t = V{} + 1;
    row.sum_s += Math<V>::exp(below_s);
    row.sum_t += e;
    row.weighted += e * (below_t - below_s);
  }
  ICSD_HD void merge(Row<T>& row, const Row<T>& other) const {
    row.max_s = row.max_t = 1;
    row.sum_s += other.sum_s;
    row.sum_t += other.sum_t;
    row.weighted += other.weighted;
  }
  template <class V>
  ICSD_HD V student(V s, V t, const V* i, const V* j) const {
    const V p = Math<V>::exp(below(s, inverse_student)), q = Math<V>::exp(below(t, inverse_teacher));
    return scale * inverse_student * (p * (i[1] + j[1]) - q * (i[3] + j[3]));
  }
  template <class V>
  ICSD_HD V teacher(V s, V t, const V* i, const V* j) const {
    const V below_t = below(t, inverse_teacher), difference = below_t - below(s, inverse_student);
    return scale * inverse_teacher * Math<V>::exp(below_t) * (i[3] * (difference - i[4]) + j[3] * (difference - j[4]));
  }
};

}  // namespace icsd::cpu
