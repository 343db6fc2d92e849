// What a block of packed attention works on: which rows it owns, what they see or are seen by, and the scores.
//
// A tile holds rows of one segment, so no NaN crosses from one to another. What its rows see lies in a few runs of
// consecutive tokens; within a run the position in the sequence alone decides: 0 <= query's - key's < window.
//
// Letters: T tokens, H query heads, K key heads, S segments.
#pragma once

#include "attention_tile.cuh"
#include "launch.cuh"

namespace alignfast::cuda {

struct Segment {
  int start, length, prompt_start, prompt_length;
};

struct Problem {
  const Segment* segments_S;  // in the order of their starts, and so of their prompts'
  int num_segments, num_tokens, num_heads, num_key_heads, width, window;  // window: INT32_MAX for none
  float scale, softcap;                                                   // softcap: 0 for none
  bool vectors_fit;
};

// Consecutive tokens with consecutive positions.
struct Run {
  int token, position, count;
};

// --- which rows a block owns ---

// Segments have ceil(length / kRows) tiles each, and no table says where a segment's begin: segment s begins with slot
// start / kRows + s, which leaves room for all before it. A few slots stay empty.
template <int kRows>
__host__ __device__ constexpr int64_t num_slots(int64_t num_tokens, int64_t num_segments) {
  return num_tokens / kRows + num_segments;
}

// The first index below n for which reached(index) holds, reached being false and then true.
template <typename Reached>
__device__ __forceinline__ int first_index(int n, Reached reached) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (reached(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

struct Tile {
  int index;  // of the segment
  Segment segment;
  int first, rows;  // rows <= 0: an empty slot

  __device__ __forceinline__ int token() const { return segment.start + first; }
  __device__ __forceinline__ int position() const { return segment.prompt_length + first; }
};

template <int kRows>
__device__ __forceinline__ Tile find_tile(const Problem& problem, int slot) {
  const Segment* segments_S = problem.segments_S;
  const int after = first_index(problem.num_segments, [&](int s) { return segments_S[s].start / kRows + s > slot; });
  Tile tile;
  tile.index = after - 1;
  tile.segment = segments_S[tile.index];
  tile.first = (slot - tile.segment.start / kRows - tile.index) * kRows;
  tile.rows = min(kRows, tile.segment.length - tile.first);
  return tile;
}

// --- scores ---

struct Score {
  float value, slope;  // slope: by scale * q . k
};

// Forward and backward must round alike, so that exp(score - lse) is exactly 1 where there is but one key: __fmul_rn is
// not drawn into a fused multiply-add with what follows.
__device__ __forceinline__ Score score_of(const Problem& problem, float dot) {
  const float raw = __fmul_rn(dot, problem.scale);
  if (problem.softcap == 0) return {raw, 1};
  const float t = tanhf(raw / problem.softcap);
  return {__fmul_rn(t, problem.softcap), 1 - t * t};
}

// __expf rounds the argument's product with log2(e), which 16-bit results do not show.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  return sizeof(T) == 4 ? expf(x) : __expf(x);
}

__device__ __forceinline__ bool sees(const Problem& problem, int query_position, int key_position) {
  return key_position <= query_position && query_position - key_position < problem.window;
}

// Whether every query of a stretch of positions sees every key of another.
__device__ __forceinline__ bool all_see(const Problem& problem, int query, int queries, int key, int keys) {
  return key + keys - 1 <= query && query + queries - 1 - key < problem.window;
}

// visit(token, position, count) for the keys of a tile of queries, kColumns at a time: the prompt's, then those of its
// segment up to its last row, each from the first that is near enough to the tile's first row.
template <int kColumns, typename Visit>
__device__ __forceinline__ void walk_keys(const Problem& problem, const Tile& tile, Visit visit) {
  const Segment& segment = tile.segment;
#pragma unroll 1  // one copy of the visit's code
  for (int own = 0; own < 2; ++own) {
    const Run run = own ? Run{segment.start, segment.prompt_length, tile.first + tile.rows}
                        : Run{segment.prompt_start, 0, segment.prompt_length};
    const int skipped = max(0, tile.position() - run.position - problem.window + 1);
    for (int i = skipped; i < run.count; i += kColumns) {
      visit(run.token + i, run.position + i, min(kColumns, run.count - i));
    }
  }
}

// --- what the host passes ---

template <typename T>
HeadRows<T> rows_of(const Tensor<3>& tensor) {
  if (tensor.sizes[0] > 0 && tensor.sizes[2] > 1 && tensor.strides[2] != 1) {
    throw std::invalid_argument("packed_attention: heads must be contiguous along their width, got a stride of " +
                                std::to_string(tensor.strides[2]));
  }
  return {static_cast<T*>(tensor.data), tensor.strides[0], tensor.strides[1]};
}

// Whether each head of each token lies on 16 bytes.
inline bool on_vectors(const Tensor<3>& tensor) {
  const int64_t size = tensor.dtype == kFloat32 ? 4 : 2;
  return misalignment(tensor.data) == 0 && tensor.strides[0] * size % kVectorBytes == 0 &&
         tensor.strides[1] * size % kVectorBytes == 0 && tensor.sizes[2] * size % kVectorBytes == 0;
}

inline Problem problem_of(const Tensor<3>& query, const Tensor<3>& key, const Tensor<3>& value,
                          const Tensor<2>& segments_S4, double scale, int64_t window, double softcap) {
  if (query.sizes[2] > 256) {
    throw std::invalid_argument("packed_attention: heads up to 256 wide, got " + std::to_string(query.sizes[2]));
  }
  return {static_cast<const Segment*>(segments_S4.data), static_cast<int>(segments_S4.sizes[0]),
          static_cast<int>(query.sizes[0]), static_cast<int>(query.sizes[1]), static_cast<int>(key.sizes[1]),
          static_cast<int>(query.sizes[2]),
          window > 0 && window < query.sizes[0] ? static_cast<int>(window) : INT32_MAX,
          static_cast<float>(scale), static_cast<float>(softcap),
          on_vectors(query) && on_vectors(key) && on_vectors(value)};
}

// Calls visit(T{}, width), the width an integral_constant.
template <typename Visit>
void with_kernel(int64_t dtype, int width, Visit visit) {
  with_dtype(dtype, [&](auto zero) {
    if (width <= 64) return visit(zero, std::integral_constant<int, 64>{});
    if (width <= 128) return visit(zero, std::integral_constant<int, 128>{});
    visit(zero, std::integral_constant<int, 256>{});
  });
}

}  // namespace alignfast::cuda
