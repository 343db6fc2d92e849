// Divergence between rows of logits and their reference, and its gradient: kernels/ops/kl_divergence.py has the formulas.
//
// Both rows are walked together, once, in blocks that stay in the L1 cache: sums against the largest value so far, float
// within a block and double across, as in token_logps.cpp. Jensen and Shannon's needs the probabilities themselves, and so
// a second walk.
//
// A row is read as its core, plus or minus z, or tanh(z * factor), and x = outer * core. d = outer * (core - the largest
// core of its row), whose first digits are exact where x itself would be rounded; e = e^d; a is the distribution that the
// sum is under, b the other: KL(a || b) = sum_v p_a (log p_a - log p_b).
#include "row.h"

namespace alignfast::ALIGNFAST_ISA {
namespace {

enum Kind { kForward, kReverse, kJensenShannon };
enum Stat { kDivergence, kTop, kExps, kRefTop, kRefExps, kOwn, kStats };  // kOwn: KL(policy || mixture)

constexpr float kFar = -100.0f;     // e^-100 is 0 in float32, and 0 * -100 is 0 where 0 * -inf is NaN
constexpr float kFarthest = -1e30f;  // stands for -inf in a difference: times e of at most 1, and 512 of them, finite
constexpr float kLog2 = 0.693147181f;

struct Options {
  Kind kind;
  double scale, softcap, temperature;

  float outer() const { return float((softcap ? softcap : fabs(scale)) / temperature); }
  LogitRow row(const Tensor<2>& logits, int64_t row) const {
    LogitRow core(logits, row, scale, softcap, temperature);
    if (!softcap) core.factor = scale < 0 ? -1.0f : 1.0f;
    core.outer = 1.0f;
    return core;
  }
};

// ---- forward ----

// Of one row: the largest core so far and the sum of e against it.
struct Side {
  float top = -INFINITY;
  double exps = 0;

  float base() const { return top == -INFINITY ? 0.0f : top; }

  // Takes a larger top; returns by how much d falls.
  double raise(float largest, float outer) {
    if (!(largest > top)) return 0;
    const double step = top == -INFINITY ? 0 : (double(top) - largest) * outer;
    exps *= ::exp(step);
    top = largest;
    return step;
  }
};

struct Sums {
  float outer;
  Side a = {}, b = {};
  double moment = 0;     // sum e_a (d_a - d_b)
  bool missing = false;  // b rules out what a does not

  void raise(float a_largest, float b_largest) {
    const double before = a.exps;
    const double a_step = a.raise(a_largest, outer), b_step = b.raise(b_largest, outer);
    if (a_step || b_step) moment = ::exp(a_step) * (moment + (a_step - b_step) * before);
  }

  double divergence() const {
    if (!(a.exps > 0 && b.exps > 0 && a.top < INFINITY && b.top < INFINITY)) return NAN;
    return missing ? INFINITY : moment / a.exps + ::log(b.exps / a.exps);
  }
};

// Float sums of 16 numbers a lane whatever the lanes: with 64, four lanes were more than twice as wrong as PyTorch.
constexpr int kChain = 16 * kStep;

void add_chain(const float* a, const float* b, int n, const char* const next[2], const int64_t item_sizes[2],
               Sums& sums) {
  const float a_base = sums.a.base(), b_base = sums.b.base();
  F32 a_exps[2] = {}, b_exps[2] = {}, moment[2] = {};
  I32 missing = {};
  for (int i = 0; i < n; i += kStep) {
    for (int j = 0; j < 2; ++j) {
      const int at = i + j * kLanes;
      for (int side = 0; side < 2; ++side) __builtin_prefetch(next[side] + int64_t(at) * item_sizes[side]);
      const F32 a_d = (load(a + at) - a_base) * sums.outer, b_d = (load(b + at) - b_base) * sums.outer;
      const F32 e = exp(a_d);
      a_exps[j] += e;
      b_exps[j] += exp(b_d);
      moment[j] = fma(e, max(splat(kFar), a_d) - max(splat(kFarthest), b_d), moment[j]);
      missing |= (load(b + at) == -INFINITY) & (load(a + at) > -INFINITY);
    }
  }
  for (int j = 0; j < 2; ++j) {
    sums.a.exps += exact_sum(a_exps[j]);
    sums.b.exps += exact_sum(b_exps[j]);
    sums.moment += exact_sum(moment[j]);
  }
  for (int lane = 0; lane < kLanes; ++lane) sums.missing |= missing[lane] != 0;
}

template <bool capped>
Sums sum_rows(const LogitRow& a_row, const LogitRow& b_row, float outer) {
  alignas(64) float a[kBlock], b[kBlock];
  const int64_t item_sizes[2] = {a_row.item_size, b_row.item_size};
  Sums sums{outer};
  for (int64_t start = 0; start < a_row.classes; start += kBlock) {
    const float a_largest = max_lane(read_logits<capped>(a_row, start, a));
    const float b_largest = max_lane(read_logits<capped>(b_row, start, b));
    sums.raise(a_largest, b_largest);
    const int n = a_row.length(start);
    for (int at = 0; at < n; at += kChain) {
      const char* const next[2] = {a_row.after(start + at), b_row.after(start + at)};
      add_chain(a + at, b + at, n - at < kChain ? n - at : kChain, next, item_sizes, sums);
    }
  }
  return sums;
}

// How log p follows from a core.
struct Norm {
  float outer, top, log_sum;

  static Norm of(const float* stats, Stat top, Stat exps, float outer) {
    return {outer, stats[top], float(::log(double(stats[exps])))};
  }
  // never -inf, so that differences and products with a p of 0 are no NaN
  F32 logp(F32 core) const { return max(splat(kFarthest), (core - top) * outer - log_sum); }
};

// log(p / m) for the mixture m = (p + q) / 2.
ALIGNFAST_INLINE F32 log_over_mixture(F32 logp, F32 logq) {
  const F32 gap = logp - logq;
  const F32 above = gap > 0.0f ? F32{} : gap;  // log p - max(log p, log q)
  return above - log1p_to_1(exp(-abs(gap))) + kLog2;
}

// KL(policy || mixture) and KL(reference || mixture).
template <bool capped>
void add_mixture(const LogitRow& row, const LogitRow& ref_row, float outer, float* stats) {
  alignas(64) float x[kBlock], y[kBlock];
  const Norm norm = Norm::of(stats, kTop, kExps, outer), ref_norm = Norm::of(stats, kRefTop, kRefExps, outer);
  double own = 0, ref = 0;
  for (int64_t start = 0; start < row.classes; start += kBlock) {
    read_logits<capped>(row, start, x);
    read_logits<capped>(ref_row, start, y);
    F32 own_sum = {}, ref_sum = {};
    for (int i = 0; i < row.length(start); i += kLanes) {
      const F32 logp = norm.logp(load(x + i)), logq = ref_norm.logp(load(y + i));
      own_sum = fma(exp(logp), log_over_mixture(logp, logq), own_sum);
      ref_sum = fma(exp(logq), log_over_mixture(logq, logp), ref_sum);
    }
    own += exact_sum(own_sum);
    ref += exact_sum(ref_sum);
  }
  stats[kDivergence] = float((own + ref) / 2);
  stats[kOwn] = float(own);
}

template <bool capped>
void forward_row(const LogitRow& row, const LogitRow& ref_row, Kind kind, float outer, float* stats) {
  const bool under_ref = kind == kForward;
  const Sums sums = under_ref ? sum_rows<capped>(ref_row, row, outer) : sum_rows<capped>(row, ref_row, outer);
  const Side &own = under_ref ? sums.b : sums.a, &ref = under_ref ? sums.a : sums.b;
  stats[kDivergence] = float(sums.divergence());
  stats[kTop] = own.top;
  stats[kExps] = float(own.exps);
  stats[kRefTop] = ref.top;
  stats[kRefExps] = float(ref.exps);
  stats[kOwn] = 0;
  if (kind != kJensenShannon) return;
  if (isnan(stats[kDivergence])) {
    stats[kOwn] = NAN;
  } else {
    add_mixture<capped>(row, ref_row, outer, stats);
  }
}

// ---- backward ----

// The slope of the divergence by x.
template <Kind kind>
ALIGNFAST_INLINE F32 slope(F32 logp, F32 logq, const float* stats) {
  if (kind == kForward) return exp(logp) - exp(logq);
  const F32 excess = kind == kReverse ? logp - logq - stats[kDivergence]
                                      : 0.5f * (log_over_mixture(logp, logq) - stats[kOwn]);
  return exp(logp) * excess;
}

template <bool capped, Kind kind>
void backward_row(const LogitRow& row, const LogitRow& ref_row, const Options& options, const float* stats,
                  float upstream, const Tensor<2>& out, int64_t out_row) {
  alignas(64) float block[kBlock], y[kBlock];
  const float outer = options.outer(), dx_dz = float(options.scale / options.temperature) * upstream;
  const Norm norm = Norm::of(stats, kTop, kExps, outer), ref_norm = Norm::of(stats, kRefTop, kRefExps, outer);
  for (int64_t start = 0; start < row.classes; start += kBlock) {
    read_logits<false>(row, start, block);
    read_logits<capped>(ref_row, start, y);
    const int n = row.length(start);
    for (int i = 0; i < n; i += kLanes) {
      __builtin_prefetch(row.after(start) + int64_t(i) * row.item_size);
      __builtin_prefetch(ref_row.after(start) + int64_t(i) * ref_row.item_size);
      F32 core = load(block + i), dz = splat(dx_dz);
      if (capped) {
        const Tanh tanh = tanh_and_slope(core);
        core = tanh.value;
        dz = tanh.slope * dx_dz;
      }
      store(block + i, slope<kind>(norm.logp(core), ref_norm.logp(load(y + i)), stats) * dz);
    }
    write_block(block, n, out, out_row, start);
  }
}

}  // namespace

// stats (6, T) from logits and their reference (T, V) with unit column strides; kind: a Kind.
static void kl_divergence_forward(Tensor<2> logits, Tensor<2> ref_logits, int64_t kind, double scale, double softcap,
                                  double temperature, Tensor<2> stats, int64_t threads) {
  const Options options{Kind(kind), scale, softcap, temperature};
  const auto walk = softcap ? forward_row<true> : forward_row<false>;
  for_rows(logits.sizes[0], logits.sizes[1], threads, [&](int64_t row) {
    float of_row[kStats];
    walk(options.row(logits, row), options.row(ref_logits, row), options.kind, options.outer(), of_row);
    for (int stat = 0; stat < kStats; ++stat) {
      static_cast<float*>(stats.data)[stat * stats.strides[0] + row * stats.strides[1]] = of_row[stat];
    }
  });
}

// out (T, V) = gradient of the logits under upstream (T). `out` may be `logits`: a block is read before it is written.
static void kl_divergence_backward(Tensor<2> logits, Tensor<2> ref_logits, Tensor<2> stats, Tensor<1> upstream,
                                   int64_t kind, double scale, double softcap, double temperature, Tensor<2> out,
                                   int64_t threads) {
  const Options options{Kind(kind), scale, softcap, temperature};
  const auto walk = options.kind == kForward   ? softcap ? backward_row<true, kForward> : backward_row<false, kForward>
                    : options.kind == kReverse ? softcap ? backward_row<true, kReverse> : backward_row<false, kReverse>
                    : softcap                  ? backward_row<true, kJensenShannon>
                                               : backward_row<false, kJensenShannon>;
  for_rows(logits.sizes[0], logits.sizes[1], threads, [&](int64_t row) {
    float of_row[kStats];
    for (int stat = 0; stat < kStats; ++stat) {
      of_row[stat] = static_cast<const float*>(stats.data)[stat * stats.strides[0] + row * stats.strides[1]];
    }
    const float dkl = static_cast<const float*>(upstream.data)[row * upstream.strides[0]];
    const bool lost = isnan(of_row[kDivergence]) || (options.kind == kReverse && isinf(of_row[kDivergence]));
    if (dkl == 0 || lost) return fill_row(out, row, dkl == 0 ? 0.0f : NAN);
    walk(options.row(logits, row), options.row(ref_logits, row), options, of_row, dkl, out, row);
  });
}

}  // namespace alignfast::ALIGNFAST_ISA

ALIGNFAST_EXPORT(kl_divergence_forward)
ALIGNFAST_EXPORT(kl_divergence_backward)
