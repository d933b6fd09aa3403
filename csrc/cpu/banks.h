// Passes over a piece of the similarities to banks, for `kl`. The products are made elsewhere.
#pragma once

#include <cstdint>

#include "cpu/kernels/bank_kernels.h"

namespace icsd::cpu {

// The exponents of student and teacher, (rows, columns) each.
template <class C>
struct Exponents {
  C *student, *teacher;
  std::int64_t rows, columns;
};

// Replaces the exponents by exponentials and adds these to the rows. With `rising`, their sums become relative to the
// largest exponents so far.
template <class C>
void add_exponentials(const Exponents<C>& exponents, BankRow<C>* rows, bool rising);

// Replaces the exponents by the derivatives of all rows with respect to them, times a factor for each of the two.
template <class C>
void exponent_gradients(const Exponents<C>& exponents, const BankRow<C>* rows, C student_factor, C teacher_factor);

}  // namespace icsd::cpu
