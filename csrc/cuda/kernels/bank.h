// Launches of the kernels for losses of similarities to banks.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "core/features.h"
#include "core/spec.h"

namespace icsd::cuda {

// Student's and teacher's samples on one side of the similarities. Those that are the same have the same inverse norms.
struct BankSide {
  std::vector<Features> features;
  std::int64_t samples;
  void* inverse_norms[2];  // (groups, samples) in compute type
};

struct BankCall {
  BankSide queries, banks;
  std::int64_t groups;
  void* statistics;  // of the queries, (kMaxStatistics, groups, queries) in compute type
  const Spec& spec;

  DType dtype() const { return queries.features[0].dtype; }  // of all features
};

// The division of a pass into splits of the samples of the other side.
struct BankPlan {
  std::int64_t splits, split_samples;
};

// A pass over the similarities. Its own side is the queries, or the banks if `of_bank`.
struct BankPass {
  BankPlan plan;
  bool of_bank;
  int stage;       // whose gradient is made: 0 for the student, 1 for the teacher
  void* partials;  // gradients with respect to samples of norm 1, (splits, groups, samples, pitch), or null
  std::int64_t pitch;
  void* rows;  // sums over rows, up to kMaxStatistics numbers for each of (splits, groups, samples), or null
};

// There are at most `most` splits.
BankPlan plan_bank(DType dtype, std::int64_t groups, std::int64_t own, std::int64_t other, std::int64_t most);
std::int64_t bank_pitch(std::int64_t dim);
void launch_bank_norms(const BankCall& call, cudaStream_t stream);
void launch_bank_pass(const BankCall& call, const BankPass& pass, cudaStream_t stream);
// Writes the loss of each group and the statistics of the queries.
template <class C>
void launch_bank_rows(const BankCall& call, const void* rows, std::int64_t splits, C* value, cudaStream_t stream);
// Makes the gradient from those of the pass with respect to samples of norm 1.
void launch_bank_gradients(const BankCall& call, const BankPass& pass, const Features& out, cudaStream_t stream);

}  // namespace icsd::cuda
