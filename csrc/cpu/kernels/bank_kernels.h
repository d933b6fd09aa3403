// The kernels for pieces of similarities to banks.
#pragma once

#include <cstdint>

namespace icsd::cpu {

// A row of `kl` over the samples of the banks so far.
template <class C>
struct BankRow {
  C top_s, top_t;  // the exponents of student and teacher that the sums are relative to
  C sum_s, sum_t;  // of exponentials
  C weighted;      // the sum of the teacher's exponentials times its exponents less the student's
};
constexpr int kBankRow = sizeof(BankRow<float>) / sizeof(float);

// All take `count` exponents of a row: similarities divided by temperatures.
template <class C>
struct BankKernels {
  // Replaces the exponents by exponentials and adds these to `row`. With `rising`, the sums become relative to the
  // largest exponents so far.
  void (*forward)(C* s, C* t, std::int64_t count, bool rising, BankRow<C>* row);
  // Replaces the exponents by the derivatives of the row with respect to them, times `factor_s` and `factor_t`.
  void (*backward)(C* s, C* t, std::int64_t count, const BankRow<C>& row, C factor_s, C factor_t);
};

}  // namespace icsd::cpu
