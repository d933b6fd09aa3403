// Losses of similarities to banks on CUDA devices, beside the functions of cuda/operator.h.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/operator.h"

namespace icsd::cuda {

// Features of student and teacher, of one type.
struct BankPair {
  std::vector<Features> features;
  std::int64_t samples;
};

// Computes `mse`, `kl` or `smooth_l1` of the similarities of queries to banks, and the gradients of student, teacher
// and their banks for gradients 1 of the loss; those without memory are not wanted. All features are of one type, and
// no side is without samples.
template <class C>
void distill_to_banks(const BankPair& queries, const BankPair& banks, std::int64_t groups, const Spec& spec, C* loss,
                      const std::vector<Features>& gradients, const Context& context);

// Bytes of all partial gradients that exist at a time, unless one split has more. Tests make it smaller.
inline std::int64_t partial_gradient_bytes = 64 << 20;

}  // namespace icsd::cuda
