// A token drawn from each row of logits: kernels/ops/sample_tokens.py has the contract and the definition.
//
// A row is walked once. Of each block stay the largest logit of each lane and the sum of the weights e^((z - m) / T),
// so that without filters the token is found by a walk over the blocks' sums and then within one block.
// With filters the lanes' largest, or a bound on the weights that top-p can do without, say which blocks can hold a kept
// token: these are read again and their candidates set apart, in the order of the vocabulary. The least kept logit is
// then found by bisection over the candidates: exact, without a sort, 32 sums of a vector each 16 candidates.
// Sums are float within a block, and double across blocks and where a token is looked for.
//
// I/O: the logits once; blocks with candidates twice, from the cache.
#include <omp.h>

#include "../sample_tokens.h"

#include "row.h"

namespace alignfast::ALIGNFAST_ISA {
namespace {

// One row, with the memory of the thread that walks it.
struct Row {
  LogitRow logits;
  int64_t classes, blocks;
  float inverse;  // of the temperature
  // of each block: the sum of its weights, the largest logit of each lane and of the block
  double* sums;
  float *lane_tops, *tops;
  // of each candidate, padded to whole vectors; columns in rising order
  float *values, *weights;
  int32_t* columns;
  float top = -INFINITY;  // m
  double total = 0;       // of all weights

  Row(const Tensor<2>& tensor, int64_t row, const SampleOptions& options, float* scratch)
      : logits(tensor, row, 1.0, 0.0, 1.0),
        classes(tensor.sizes[1]),
        blocks((classes + kBlock - 1) / kBlock),
        inverse(float(1 / options.temperature)) {
    const int64_t most = classes + kLanes;
    sums = reinterpret_cast<double*>(scratch);
    tops = scratch + 2 * blocks;
    lane_tops = tops + blocks;
    values = lane_tops + blocks * kLanes;
    weights = values + most;
    columns = reinterpret_cast<int32_t*>(weights + most);
  }

  int64_t start(int64_t block) const { return block * kBlock; }
  int length(int64_t block) const { return logits.length(start(block)); }

  F32 read(int64_t block, float* z) const { return read_logits<false>(logits, start(block), z); }

  F32 weight(F32 z, float from) const { return exp((z - from) * inverse); }

  // Weights relative to the row's largest logit.
  void weigh(const float* z, int64_t count, float* to) const {
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, weight(load(z + i), top));
  }

  // log e^((z - m) / T), not rounded to float
  double exponent(float z, const SampleOptions& options) const { return (double(z) - top) / options.temperature; }
};

// ---- the first walk ----

double sum_weights(const Row& row, const float* z, int64_t block, float top) {
  const float from = top == -INFINITY ? 0.0f : top;
  const char* next = row.logits.after(row.start(block));
  const int n = row.length(block);
  F32 sums[2] = {};
  for (int i = 0; i < n; i += kStep) {
    for (int j = 0; j < 2; ++j) {
      const int at = i + j * kLanes;
      __builtin_prefetch(next + int64_t(at) * row.logits.item_size);
      sums[j] += row.weight(load(z + at), from);
    }
  }
  return exact_sum(sums[0]) + exact_sum(sums[1]);
}

// Fills sums, tops, top and total; false where the row has no distribution.
bool walk(Row& row, const SampleOptions& options) {
  alignas(64) float z[kBlock];
  for (int64_t block = 0; block < row.blocks; ++block) {
    const F32 largest = row.read(block, z);
    store(row.lane_tops + block * kLanes, largest);
    const float top = max_lane(largest);
    row.top = top > row.top ? top : row.top;
    row.sums[block] = sum_weights(row, z, block, row.top);
    row.tops[block] = row.top;  // for now what the sum is relative to
  }
  for (int64_t block = 0; block < row.blocks; ++block) {
    // NaN in the block, or inf - inf and -inf - -inf here, make the total NaN
    row.sums[block] *= ::exp(row.exponent(row.tops[block], options));
    row.total += row.sums[block];
    row.tops[block] = max_lane(load(row.lane_tops + block * kLanes));
  }
  return row.total > 0 && row.top < INFINITY;
}

// ---- filters ----

int64_t count_from(const float* values, int64_t count, float least) {
  I32 found = {};
  for (int64_t i = 0; i < count; i += kLanes) found -= load(values + i) >= least;  // -1 where it holds
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += found[lane];
  return total;
}

double mass_from(const float* values, const float* weights, int64_t count, float least) {
  double mass = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = count - start < kBlock ? count : start + kBlock;
    F32 sums = {};
    for (int64_t i = start; i < end; i += kLanes) sums += load(values + i) >= least ? load(weights + i) : F32{};
    mass += exact_sum(sums);
  }
  return mass;
}

// A logit that no kept token, and none that decides which are kept, lies below.
float lower_bound(const Row& row, const SampleOptions& options) {
  if (options.top_k) {
    // among the largest of disjoint sets, the k largest are k logits
    const int64_t lanes = row.blocks * kLanes;
    if (options.top_k > lanes) return -INFINITY;
    return largest_with(-INFINITY, row.top,
                        [&](float x) { return count_from(row.lane_tops, lanes, x) >= options.top_k; });
  }
  if (options.top_p < 1) {
    // what lies below has together at most the share 1 - top_p; one ulp lower for the rounding
    const double bound = row.top + options.temperature * ::log((1 - options.top_p) * row.total / row.classes);
    return float(bound < row.top ? bound - 1e-6 * fabs(bound) : row.top);
  }
  return least_of_floor(row.top, options);
}

// Sets apart what is not below `lower`; returns how many.
int64_t collect(const Row& row, float lower) {
  alignas(64) float z[kBlock];
  int64_t count = 0;
  for (int64_t block = 0; block < row.blocks; ++block) {
    if (row.tops[block] < lower) continue;
    row.read(block, z);
    const int32_t start = int32_t(row.start(block)), n = row.length(block);
    for (int32_t i = 0; i < n; ++i) {
      row.values[count] = z[i];
      row.columns[count] = start + i;
      count += z[i] >= lower;
    }
  }
  store(row.values + count, splat(-INFINITY));
  row.weigh(row.values, count, row.weights);
  return count;
}

// The smallest logit that the filters leave, found among the candidates.
float least_kept(const Row& row, const SampleOptions& options, float lower, int64_t count) {
  float least = least_of_floor(row.top, options);
  double mass = row.total;
  if (options.top_k && options.top_k < row.classes) {
    lower = largest_with(lower, row.top, [&](float x) { return count_from(row.values, count, x) >= options.top_k; });
    least = lower > least ? lower : least;
  }
  if (options.top_p < 1) {
    if (options.top_k) mass = mass_from(row.values, row.weights, count, lower);
    const float last = largest_with(lower, row.top, [&](float x) {
      return mass_from(row.values, row.weights, count, x) >= options.top_p * mass;
    });
    least = last > least ? last : least;
  }
  return least;
}

// ---- drawing ----

struct Draw {
  int64_t token = -1;
  float value = NAN;
  double others = NAN;  // weights of the other kept tokens
};

Draw draw_kept(const Row& row, const SampleOptions& options, double u) {
  const float lower = lower_bound(row, options);
  const int64_t count = collect(row, lower);
  const float least = least_kept(row, options, lower, count);
  double kept = 0;
  for (int64_t i = 0; i < count; ++i) kept += row.values[i] >= least ? row.weights[i] : 0.0f;
  Draw draw;
  draw.others = 0;
  double passed = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = row.values[i] >= least ? row.weights[i] : 0.0f;
    passed += weight;
    if (draw.token < 0 && passed > u * kept) {
      draw.token = row.columns[i];
      draw.value = row.values[i];
    } else {
      draw.others += weight;
    }
  }
  return draw;
}

// From all tokens. What rounding leaves over at a block's end falls to the block's likeliest token.
Draw draw_any(const Row& row, double u) {
  double left = u * row.total;
  int64_t block = 0;
  while (block + 1 < row.blocks && left >= row.sums[block]) left -= row.sums[block++];
  while (row.sums[block] == 0) --block;
  alignas(64) float z[kBlock], weights[kBlock];
  row.read(block, z);
  const int n = row.length(block);
  row.weigh(z, n, weights);
  int likeliest = 0, drawn = -1;
  for (int i = 1; i < n; ++i) likeliest = z[i] > z[likeliest] ? i : likeliest;
  for (int i = 0; i < n && drawn < 0; left -= weights[i++]) drawn = left < weights[i] ? i : -1;
  Draw draw;
  drawn = drawn < 0 ? likeliest : drawn;
  draw.token = row.start(block) + drawn;
  draw.value = z[drawn];
  return draw;
}

// Weights of all tokens but one, summed without it: a difference would lose the digits of a log-prob near 0.
double others_of(const Row& row, int64_t token) {
  const int64_t own = token / kBlock;
  double others = 0;
  for (int64_t block = 0; block < row.blocks; ++block) others += block == own ? 0 : row.sums[block];
  alignas(64) float z[kBlock];
  row.read(own, z);
  row.weigh(z, row.length(own), z);
  z[token - row.start(own)] = 0;
  for (int i = 0; i < row.length(own); ++i) others += z[i];
  return others;
}

void sample_row(Row row, const SampleOptions& options, double u, int64_t* token, float* logp, float* sampled_logp) {
  *token = -1;
  *logp = *sampled_logp = NAN;
  if (!walk(row, options)) return;
  const bool filtered = options.top_k > 0 || options.top_p < 1 || options.floor > -INFINITY;
  const Draw draw = filtered ? draw_kept(row, options, options.greedy ? 0.0 : u) : draw_any(row, u);
  const double exponent = row.exponent(draw.value, options);
  *token = draw.token;
  *logp = logp_beside(others_of(row, draw.token), exponent);
  *sampled_logp = options.greedy ? 0.0f : filtered ? logp_beside(draw.others, exponent) : *logp;
}

}  // namespace

// Logits (B, V) with unit column stride; tokens and log-probs contiguous; a row of scratch for each thread, of
// 4 V + 1024 floats: 3 (V + kLanes) for candidates, (3 + kLanes) / kBlock a class for the blocks.
static void sample_tokens(Tensor<2> logits, Tensor<1> sequence, Tensor<1> position, int64_t seed, double temperature,
                          int64_t top_k, double top_p, double floor, int64_t greedy, Tensor<1> tokens,
                          Tensor<1> logps, Tensor<1> sampled_logps, Tensor<2> scratch, int64_t threads) {
  const SampleOptions options{seed, temperature, top_k, top_p, floor, greedy != 0};
  for_rows(logits.sizes[0], logits.sizes[1], threads, [&](int64_t b) {
    float* memory = static_cast<float*>(scratch.data) + omp_get_thread_num() * scratch.strides[0];
    const int64_t counter[2] = {static_cast<const int64_t*>(sequence.data)[b * sequence.strides[0]],
                                static_cast<const int64_t*>(position.data)[b * position.strides[0]]};
    sample_row(Row(logits, b, options, memory), options, philox_uniform(seed, counter[0], counter[1]),
               static_cast<int64_t*>(tokens.data) + b, static_cast<float*>(logps.data) + b,
               static_cast<float*>(sampled_logps.data) + b);
  });
}

}  // namespace alignfast::ALIGNFAST_ISA

ALIGNFAST_EXPORT(sample_tokens)
