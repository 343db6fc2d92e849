// One pair's loss as a function of its margin, and the slope: shared by csrc/cpu/ and csrc/cuda/.
//
// kernels/ops/preference_loss.py has the definition, the papers and the numbers of the losses (`code` in LOSSES).
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
  float loss;
  float slope;  // derivative by the margin
};

// Whether the margin is of log-probs per token.
ALIGNFAST_PAIR bool averages_tokens(int code) { return code == kIpo; }

// log(1 + e^x) = -logsigmoid(-x)
ALIGNFAST_PAIR float pair_softplus(float x) { return (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x))); }

// Never 1 - sigmoid(-x), which would lose the digits of small ones.
ALIGNFAST_PAIR float pair_sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// margin: log-ratio of the chosen minus log-ratio of the rejected, each per token if averages_tokens(code).
ALIGNFAST_PAIR PairLoss pair_loss(int code, float margin, float beta, float label_smoothing) {
  if (code == kIpo) {
    const float excess = margin - 0.5f / beta;
    return {excess * excess, 2.0f * excess};
  }
  const float x = beta * margin;
  if (code == kHinge) {
    const float loss = 1.0f - x;
    return {loss < 0.0f ? 0.0f : loss, loss > 0.0f ? -beta : loss <= 0.0f ? 0.0f : loss};  // NaN stays NaN
  }
  // the label is right with weight `right`, flipped with weight `flipped`
  const float norm = code == kRobust ? 1.0f - 2.0f * label_smoothing : 1.0f;
  const float right = (1.0f - label_smoothing) / norm;
  const float flipped = (code == kRobust ? -label_smoothing : label_smoothing) / norm;
  PairLoss pair = {right * pair_softplus(-x), -beta * right * pair_sigmoid(-x)};
  if (flipped != 0.0f) {  // 0 * inf would be NaN at infinite margins
    pair.loss += flipped * pair_softplus(x);
    pair.slope += beta * flipped * pair_sigmoid(x);
  }
  return pair;
}

}  // namespace alignfast
