// Generalised advantage estimation: kernels/ops/gae.py has the formula and the two conventions for masked steps.
//
// A vector holds one step of kLanes rows. So a tile of these rows is copied in row by row, which is how memory and its
// pages like to be read (rows a power of two apart fall into the same cache sets), turned, walked from the last step
// to the first, turned back and copied out, past the caches where the results would not stay in them.
//
// I/O: rewards, values and mask are read once, advantages and returns written once: 17 bytes a step in float32.
#include "gemm.h"
#include "threads.h"

namespace alignfast::ALIGNFAST_ISA {
namespace {

constexpr int64_t kPastCaches = 1 << 21;  // steps, 16 MB of results: 4096 x 2048 took 13.7 ms through them, and takes 6.7
constexpr int kColumns = 128;  // steps of a tile: five buffers of it stay in the first cache

struct Rows {
  const float *rewards, *values, *bootstrap;
  const uint8_t* mask;
  float *advantages, *returns;
  int64_t steps;
  float gamma, decay;
  bool decays;
  bool past_caches;
};

// A tile's rows, one after the other.
struct Tile {
  alignas(64) float at[kLanes][kColumns];
};

// What the steps after a tile leave to it: the advantage, and the value of the next step that counts.
struct Carry {
  F32 advantage, next;
};

// kLanes steps of the tile, from the last to the first; advantages and returns take the place of rewards and values.
void walk_square(const Rows& in, Tile& rewards, Tile& values, const Tile& mask, int first, Carry& carry) {
  alignas(64) float square[3][kLanes][kLanes];  // [step][row]
  transpose_square(&rewards.at[0][first], kColumns, square[0][0], kLanes);
  transpose_square(&values.at[0][first], kColumns, square[1][0], kLanes);
  transpose_square(&mask.at[0][first], kColumns, square[2][0], kLanes);
  for (int i = kLanes - 1; i >= 0; --i) {
    const I32 counts = load(square[2][i]) > 0.0f;
    const I32 taken = in.decays ? load(square[2][i]) >= 0.0f : counts;
    // masked numbers may be NaN, which a product with 0 would keep
    const F32 reward = counts ? load(square[0][i]) : F32{}, value = counts ? load(square[1][i]) : F32{};
    const F32 step = reward + in.gamma * carry.next - value + in.decay * carry.advantage;
    carry.advantage = taken ? step : carry.advantage;
    carry.next = taken ? value : carry.next;
    store(square[0][i], counts ? carry.advantage : F32{});
    store(square[1][i], counts ? carry.advantage + value : F32{});
  }
  transpose_square(square[0][0], kLanes, &rewards.at[0][first], kColumns);
  transpose_square(square[1][0], kLanes, &values.at[0][first], kColumns);
}

// Past the caches, memory need not be read before it is written.
void copy_out(float* to, const float* from, int count, bool past_caches) {
  int i = 0;
  if (past_caches && (uintptr_t)to % sizeof(F32) == 0) {
    for (; i + kLanes <= count; i += kLanes) stream(to + i, load(from + i));
  }
  memcpy(to + i, from + i, (count - i) * sizeof(float));
}

// Steps [first, first + count) of `rows` <= kLanes rows from `row` on. What lies beyond has the mask -1: no step.
void walk_tile(const Rows& in, int64_t row, int rows, int64_t first, int count, Carry& carry) {
  Tile rewards, values, mask;
  for (int i = 0; i < kLanes; ++i) {
    const int64_t at = (row + i) * in.steps + first;
    const int here = i < rows ? count : 0;
    memcpy(rewards.at[i], in.rewards + at, here * sizeof(float));
    memcpy(values.at[i], in.values + at, here * sizeof(float));
    for (int c = 0; c < here; ++c) mask.at[i][c] = in.mask[at + c] ? 1.0f : 0.0f;
    for (int c = here; c < kColumns; ++c) mask.at[i][c] = -1.0f;
  }
  for (int c = (count - 1) / kLanes * kLanes; c >= 0; c -= kLanes) walk_square(in, rewards, values, mask, c, carry);
  for (int i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * in.steps + first;
    copy_out(in.advantages + at, rewards.at[i], count, in.past_caches);
    copy_out(in.returns + at, values.at[i], count, in.past_caches);
  }
}

void walk_rows(const Rows& in, int64_t row, int rows) {
  Carry carry = {F32{}, load_first(in.bootstrap + row, rows, 0.0f)};
  int64_t first = (in.steps - 1) / kColumns * kColumns;
  for (; first >= 0; first -= kColumns) {
    const int64_t left = in.steps - first;
    walk_tile(in, row, rows, first, left < kColumns ? int(left) : kColumns, carry);
  }
}

}  // namespace

// All contiguous and float32, but for the mask of bool.
static void gae(Tensor<2> rewards, Tensor<2> values, Tensor<2> mask, Tensor<1> bootstrap, double gamma, double decay,
                int64_t decays, Tensor<2> advantages, Tensor<2> returns, int64_t threads) {
  const Rows in = {(const float*)rewards.data,
                   (const float*)values.data,
                   (const float*)bootstrap.data,
                   (const uint8_t*)mask.data,
                   (float*)advantages.data,
                   (float*)returns.data,
                   values.sizes[1],
                   float(gamma),
                   float(decay),
                   decays != 0,
                   values.sizes[0] * values.sizes[1] >= kPastCaches};
  const int64_t num_rows = values.sizes[0];
  const int workers = threads_for(num_rows * in.steps, threads);
#pragma omp parallel for num_threads(workers) if (workers > 1) schedule(dynamic, 1)
  for (int64_t row = 0; row < num_rows; row += kLanes) {
    const int64_t left = num_rows - row;
    walk_rows(in, row, left < kLanes ? int(left) : kLanes);
  }
}

}  // namespace alignfast::ALIGNFAST_ISA

ALIGNFAST_EXPORT(gae)
