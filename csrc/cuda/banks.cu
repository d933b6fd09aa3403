// Losses of similarities to banks and their gradients: sums over rows, then gradients, each in one pass over the
// similarities. A loss of elements makes the sums together with the student's gradient; `kl` needs them before.
#include "cuda/banks.h"

#include <algorithm>

#include "cuda/kernels/bank.h"
#include "cuda/runtime/workspace.h"

namespace icsd::cuda {
namespace {

// The passes of a call, without memory yet, and its workspace.
template <class C>
struct BankPasses {
  WorkspaceLayout layout;
  Array<C> inverse_norms[2][2], statistics;
  Array<C> rows, partials;  // of one pass; the next one overwrites them
  std::vector<BankPass> passes;
  std::vector<const Features*> outs;  // the gradient of each pass, or null

  BankPasses(const BankCall& call, const std::vector<Features>& gradients) {
    add_norms(call);
    const bool at_once = gradients[0].data && call.spec.loss != LossKind::kl;
    if (!at_once) add_pass(call, {}, nullptr);
    for (int k = 0; k < 4; ++k) {
      if (!gradients[k].data) continue;
      BankPass pass{};
      pass.of_bank = k >= 2;
      pass.stage = k % 2;
      pass.pitch = bank_pitch(gradients[k].dim);
      add_pass(call, pass, &gradients[k]);
    }
    const std::int64_t queries = call.groups * call.queries.samples;
    rows = layout.add<C>(passes[0].plan.splits * queries * kMaxStatistics);
    partials = layout.add<C>(partial_elements_);
    statistics = layout.add<C>(call.spec.loss == LossKind::kl ? kMaxStatistics * queries : 0);
  }

  // Places the arrays in memory. The first pass sums up the rows.
  void place(BankCall& call, void* workspace) {
    for (int k = 0; k < 2; ++k) {
      call.queries.inverse_norms[k] = inverse_norms[0][k].in(workspace);
      call.banks.inverse_norms[k] = inverse_norms[1][k].in(workspace);
    }
    call.statistics = statistics.in(workspace);
    for (std::size_t k = 0; k < passes.size(); ++k) {
      if (outs[k]) passes[k].partials = in_place(passes[k], *outs[k]) ? outs[k]->data : partials.in(workspace);
    }
    passes[0].rows = rows.in(workspace);
  }

 private:
  void add_norms(const BankCall& call) {
    const auto add = [&](const BankSide& side, Array<C>(&arrays)[2]) {
      const Features &student = side.features[0], &teacher = side.features[1];
      const bool same = student.data == teacher.data && student.dim == teacher.dim &&
                        student.group_stride == teacher.group_stride && student.sample_stride == teacher.sample_stride;
      arrays[0] = layout.add<C>(call.groups * side.samples);
      arrays[1] = same ? arrays[0] : layout.add<C>(call.groups * side.samples);
    };
    add(call.queries, inverse_norms[0]);
    add(call.banks, inverse_norms[1]);
  }

  void add_pass(const BankCall& call, BankPass pass, const Features* out) {
    const std::int64_t own = (pass.of_bank ? call.banks : call.queries).samples;
    const std::int64_t other = (pass.of_bank ? call.queries : call.banks).samples;
    const std::int64_t gradient = out ? call.groups * own * pass.pitch : 0;
    const std::int64_t bytes = std::max<std::int64_t>(1, gradient * sizeof(C));
    pass.plan = plan_bank(call.dtype(), call.groups, own, other, partial_gradient_bytes / bytes);
    if (out && !in_place(pass, *out)) {
      partial_elements_ = std::max(partial_elements_, pass.plan.splits * gradient);
    }
    passes.push_back(pass);
    outs.push_back(out);
  }

  // Returns true if the memory of the gradient holds partial ones.
  static bool in_place(const BankPass& pass, const Features& out) {
    const bool is_compute_type = out.dtype == DType::float32 || out.dtype == DType::float64;
    return pass.plan.splits == 1 && is_compute_type && pass.pitch == out.dim &&
           reinterpret_cast<std::uintptr_t>(out.data) % 16 == 0;
  }

  std::int64_t partial_elements_ = 0;
};

}  // namespace

template <class C>
void distill_to_banks(const BankPair& queries, const BankPair& banks, std::int64_t groups, const Spec& spec, C* loss,
                      const std::vector<Features>& gradients, const Context& context) {
  if (groups == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  BankCall call{{queries.features, queries.samples, {}}, {banks.features, banks.samples, {}}, groups, nullptr, spec};
  BankPasses<C> passes(call, gradients);
  passes.place(call, context.allocate(passes.layout.bytes()));
  launch_bank_norms(call, stream);
  for (std::size_t k = 0; k < passes.passes.size(); ++k) {
    const BankPass& pass = passes.passes[k];
    launch_bank_pass(call, pass, stream);
    if (pass.rows) launch_bank_rows(call, pass.rows, pass.plan.splits, loss, stream);
    if (pass.partials) launch_bank_gradients(call, pass, *passes.outs[k], stream);
  }
}

template void distill_to_banks<float>(const BankPair&, const BankPair&, std::int64_t, const Spec&, float*,
                                      const std::vector<Features>&, const Context&);
template void distill_to_banks<double>(const BankPair&, const BankPair&, std::int64_t, const Spec&, double*,
                                       const std::vector<Features>&, const Context&);

}  // namespace icsd::cuda
