// One pair's loss as a function of its margin, and the slope: shared by csrc/cpu/ and csrc/cuda/.
//
// In double: a margin of hundreds of nats rounded to float shifts the slope by more than float's last place, and one
// number a pair costs nothing. kernels/ops/preference_loss.py has the definition, the papers and the numbers of the
// losses (`code` in LOSSES).
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define ALIGNFAST_PAIR static __host__ __device__ __forceinline__
#else
#define ALIGNFAST_PAIR static inline __attribute__((always_inline))  // no copy for the linker to share: export.h
#endif

namespace alignfast {

enum PreferenceCode { kSigmoid = 0, kHinge = 1, kIpo = 2, kRobust = 3 };

struct PairLoss {
  double loss;
  double slope;  // derivative by the margin
};

// Whether the margin is of log-probs per token.
ALIGNFAST_PAIR bool averages_tokens(int code) { return code == kIpo; }

// log(1 + e^x) = -logsigmoid(-x)
ALIGNFAST_PAIR double pair_softplus(double x) { return (x > 0.0 ? x : 0.0) + log1p(exp(-fabs(x))); }

// Never 1 - sigmoid(-x), which would lose the digits of small ones.
ALIGNFAST_PAIR double pair_sigmoid(double x) {
  const double e = exp(-fabs(x));
  return (x < 0.0 ? e : 1.0) / (1.0 + e);
}

// margin: log-ratio of the chosen minus log-ratio of the rejected, each per token if averages_tokens(code).
ALIGNFAST_PAIR PairLoss pair_loss(int code, double margin, double beta, double label_smoothing) {
  if (code == kIpo) {
    const double excess = margin - 0.5 / beta;
    return {excess * excess, 2.0 * excess};
  }
  const double x = beta * margin;
  if (code == kHinge) {
    const double loss = 1.0 - x;
    return {loss < 0.0 ? 0.0 : loss, loss > 0.0 ? -beta : loss <= 0.0 ? 0.0 : loss};  // NaN stays NaN
  }
  // the label is right with weight `right`, flipped with weight `flipped`
  const double norm = code == kRobust ? 1.0 - 2.0 * label_smoothing : 1.0;
  const double right = (1.0 - label_smoothing) / norm;
  const double flipped = (code == kRobust ? -label_smoothing : label_smoothing) / norm;
  PairLoss pair = {right * pair_softplus(-x), -beta * right * pair_sigmoid(-x)};
  if (flipped != 0.0) {  // 0 * inf would be NaN at infinite margins
    pair.loss += flipped * pair_softplus(x);
    pair.slope += beta * flipped * pair_sigmoid(x);
  }
  return pair;
}

}  // namespace alignfast
