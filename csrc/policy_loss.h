// One token's policy loss as a function of its log-probs, and the slope: shared by csrc/cpu/ and csrc/cuda/.
//
// kernels/ops/_policy.py has the definition and the papers: the clipped losses at token level, with the KL estimate k3.
#pragma once

#include "kl.h"

namespace alignfast {

// What is summed over tokens, but for the largest ratio; the order of SUMS in kernels/ops/_policy.py.
enum PolicySum { kKl, kLow, kHigh, kCapped, kRatio, kApproxK1, kApproxK3, kMaxRatio, kPolicySums };

// Numbers of a partial sum: a block of csrc/cuda/, and the same on a CPU, where no number of threads may change a sum.
constexpr int kPolicyBlock = 256;

// The ratio is held below `high` where the advantage is positive, between `low` and `cap` where it is negative.
struct PolicyOptions {
  float low, high, cap, log_low, log_high, log_cap, beta;
  bool corrects_kl, has_reference;

  static PolicyOptions of(double low, double high, double cap, double beta, bool corrects_kl, bool has_reference) {
    return {float(low), float(high), float(cap), float(log(low)), float(log(high)), float(log(cap)), float(beta),
            corrects_kl, has_reference};
  }
};

template <class Math>
struct PolicyToken {
  typename Math::F loss, slope;
  typename Math::F sums[kPolicySums];
};

// Comparisons are of log-ratios: the ratio of one 100 nats off is inf, and clipped all the same.
template <class Math>
ALIGNFAST_TOKEN PolicyToken<Math> policy_token(typename Math::F logp, typename Math::F old, typename Math::F advantage,
                                               typename Math::F reference, const PolicyOptions& options) {
  using F = typename Math::F;
  const F zero = Math::number(0.0f), one = Math::number(1.0f);
  const F x = logp - old;
  const Exponential<Math> ratio = exponential<Math>(x);
  const auto is_up = advantage >= 0.0f;
  const auto is_over = x > (is_up ? Math::number(options.log_high) : Math::number(options.log_cap));
  const auto is_under = x < (is_up ? Math::number(-INFINITY) : Math::number(options.log_low));
  const F most = is_up ? Math::number(options.high) : Math::number(options.cap);
  const F weight = is_over ? most : is_under ? Math::number(options.low) : ratio.value;
  const F policy = -advantage * weight;
  PolicyToken<Math> token = {policy, (is_over | is_under) ? zero : policy, {}};
  F kl = zero;
  if (options.has_reference) {
    const F d = reference - logp;
    const Exponential<Math> of_reference = exponential<Math>(d);
    kl = of_reference.excess;
    F slope = -of_reference.minus1;
    if (options.corrects_kl) {
      kl = kl * ratio.value;
      slope = -d * ratio.value;  // (k3 + dk3) times the ratio, whose own slope it is: exp(d) drops out
    }
    token.loss = token.loss + options.beta * kl;
    token.slope = token.slope + options.beta * slope;
  }
  token.sums[kKl] = kl;
  token.sums[kLow] = ((advantage < 0.0f) & (x < options.log_low)) ? one : zero;
  token.sums[kHigh] = ((advantage > 0.0f) & (x > options.log_high)) ? one : zero;
  token.sums[kCapped] = ((advantage < 0.0f) & (x > options.log_cap)) ? one : zero;
  token.sums[kRatio] = ratio.value;
  token.sums[kApproxK1] = -x;
  token.sums[kApproxK3] = ratio.excess;
  token.sums[kMaxRatio] = ratio.value;
  return token;
}

}  // namespace alignfast
