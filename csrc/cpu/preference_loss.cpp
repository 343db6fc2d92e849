// Pairwise losses on token log-probs laid end to end: sums, loss, rewards and the gradient of each token in one pass.
//
// kernels/ops/preference_loss.py has the definition, ../preference_loss.h the losses. Offsets are of chosen 0,
// rejected 0, chosen 1, ...; the 5 outputs are in the order of PreferenceOutput.
#include "../preference_loss.h"

#include "simd.h"
#include "threads.h"

namespace alignfast::ALIGNFAST_ISA {
namespace {

// In double throughout: a float sum of tens of nats a token was seen to shift the slope by five times its last place.
// The tokens of a step are few next to its logits, so that nothing is gained by vectors.
double sum_tokens(const float* logps, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += logps[i];
  return total;
}

struct Completion {
  int64_t start, tokens;
  double logp, ratio, per_token;  // per_token: what a token's log-prob counts in the margin
};

}  // namespace

// All contiguous, float32 but for the int64 offsets.
static void preference_loss(Tensor<1> logps_P, Tensor<1> offsets_M, Tensor<1> ref_chosen_N, Tensor<1> ref_rejected_N,
                            int64_t code, double beta, double label_smoothing, Tensor<2> out_5N, Tensor<1> dlogps_P,
                            int64_t threads) {
  const auto* logps = static_cast<const float*>(logps_P.data);
  const auto* offsets = static_cast<const int64_t*>(offsets_M.data);
  const float* refs[2] = {static_cast<const float*>(ref_chosen_N.data), static_cast<const float*>(ref_rejected_N.data)};
  auto* out = static_cast<float*>(out_5N.data);
  auto* dlogps = static_cast<float*>(dlogps_P.data);
  const int64_t pairs = out_5N.sizes[1];
  const int workers = threads_for(logps_P.sizes[0], threads);

#pragma omp parallel for num_threads(workers) if (workers > 1) schedule(dynamic, 1)
  for (int64_t pair = 0; pair < pairs; ++pair) {
    Completion sides[2];
    for (int side = 0; side < 2; ++side) {
      const int64_t start = offsets[2 * pair + side], tokens = offsets[2 * pair + side + 1] - start;
      const double logp = sum_tokens(logps + start, tokens);
      // an empty completion counts as one token
      const double per_token = averages_tokens(int(code)) && tokens > 1 ? 1.0 / tokens : 1.0;
      sides[side] = {start, tokens, logp, logp - refs[side][pair], per_token};
    }
    const auto& [chosen, rejected] = sides;
    const double margin = chosen.ratio * chosen.per_token - rejected.ratio * rejected.per_token;
    const PairLoss of_pair = pair_loss(int(code), margin, beta, label_smoothing);
    const double outputs[5] = {of_pair.loss, beta * chosen.ratio, beta * rejected.ratio, chosen.logp, rejected.logp};
    for (int i = 0; i < 5; ++i) out[i * pairs + pair] = float(outputs[i]);
    for (int side = 0; side < 2; ++side) {
      const float slope = float((side == 0 ? of_pair.slope : -of_pair.slope) * sides[side].per_token);
      for (int64_t i = 0; i < sides[side].tokens; ++i) dlogps[sides[side].start + i] = slope;
    }
  }
}

}  // namespace alignfast::ALIGNFAST_ISA

ALIGNFAST_EXPORT(preference_loss)
