// Attention over packed trees (kernels/ops/packed_attention.py has the contract and the formula).
//
// Rows are the queries of the G heads that share a key head, token by token, so a group uses the same keys. By its
// position in the sequence a key counts for a query when `query - window < key <= query`, whether it lies in the
// prompt or in the answer: one online softmax covers both. A segment's keys go by in blocks; each is copied once for
// all tiles of a part, as rows and as columns, which makes every product one of gemm.h. The rows of a part stay in
// the second cache.
#include <float.h>

#include "gemm.h"
#include "packed_attention_plan.h"

namespace alignfast::ALIGNFAST_ISA {
namespace {

constexpr int64_t kBlockKeys = 64;
// Longer products are summed in pieces of this depth. Those of dout are cut finer, since their error stays where a query
// sees few keys and dout . value and dout . out all but cancel: it halves, for 2 % of time.
constexpr int64_t kScoreDepth = 64, kGradientDepth = 16;

// A tensor (tokens, heads, width) whose last dimension is contiguous.
struct Heads {
  void* data;
  int64_t token_stride, head_stride;
};

struct Span {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
};

// A tile against a block: which keys a query sees. Both count from 0 here.
struct Pair {
  int64_t offset;  // the first query's position less the first key's
  int64_t tokens, keys, window, group;

  int64_t rows() const { return tokens * group; }

  // Keys that any of the rows sees; for the rows of one token these are all seen.
  Span keys_of(Span rows) const {
    const int64_t first = offset + rows.begin / group, last = offset + (rows.end - 1) / group;
    return {window ? clamp(first - window + 1, 0, keys) : 0, clamp(last + 1, 0, keys)};
  }
  // Rows that see any of the keys.
  Span rows_of(Span of_keys) const {
    const int64_t first = larger(0, of_keys.begin - offset);
    const int64_t end = window ? smaller(tokens, of_keys.end - 1 - offset + window) : tokens;
    return {first * group, end * group};
  }
  bool empty() const { return keys_of({0, rows()}).empty(); }
};

// ---- rows in and out ----

// Rows of `heads` heads of `tokens` tokens, token by token.
void load_rows(const Problem& problem, const Heads& from, int64_t start, int64_t tokens, int64_t head, int64_t heads,
               Matrix to) {
  const int64_t width = problem.width, ahead = from.head_stride;
  with_dtype(problem.dtype, [&](auto* type) {
    float* next = to.data;
    for (int64_t token = start; token < start + tokens; ++token) {
      for (int64_t h = head; h < head + heads; ++h, next += to.stride) {
        const auto* row = (decltype(type))from.data + token * from.token_stride + h * from.head_stride;
        int64_t e = 0;
        for (; e + kLanes <= width; e += kLanes) {
          __builtin_prefetch(row + ahead + e);  // the next task's: a tenth of the time of short segments
          store(next + e, load(row + e));
        }
        if (e < width) store(next + e, load_first(row + e, (int)(width - e), 0.0f));
      }
    }
  });
}

void store_row(const Problem& problem, const float* from, float factor, const Heads& to, int64_t token, int64_t head) {
  with_dtype(problem.dtype, [&](auto* type) {
    auto* row = (decltype(type))to.data + token * to.token_stride + head * to.head_stride;
    int64_t e = 0;
    for (; e + kLanes <= problem.width; e += kLanes) store(row + e, load(from + e) * factor);
    if (e < problem.width) store_first(row + e, load(from + e) * factor, (int)(problem.width - e));
  });
}

void add_row(int64_t width, const float* from, float* to) {
  int64_t e = 0;
  for (; e + kLanes <= width; e += kLanes) store(to + e, load(to + e) + load(from + e));
  for (; e < width; ++e) to[e] += from[e];
}

void write_row(int64_t width, const float* from, float* to, bool add) {
  if (add) {
    add_row(width, from, to);
  } else {
    memcpy(to, from, width * sizeof(float));
  }
}

void clear(Matrix matrix, int64_t rows) { memset(matrix.data, 0, rows * matrix.stride * sizeof(float)); }

void transpose(Matrix from, int64_t rows, int64_t columns, Matrix to) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) transpose_square(from.at(i, j), from.stride, to.at(j, i), to.stride);
  }
}

// to[i] = a_i . b_i, summed in the order of multiply(): where a row sees one key, dout . value and dout . out cancel to
// an exact 0, and where it sees one key almost alone, to what the softmax's own derivative would give.
void dot_rows(Matrix a, Matrix b, int64_t rows, int64_t padded_width, float* to) {
  float columns[2][kLanes * kLanes];
  for (int64_t i = 0; i < rows; i += kLanes) {
    F32 totals = {}, partial = {};
    for (int64_t e = 0; e < padded_width; e += kLanes) {
      if (e % kGradientDepth == 0) {
        totals += partial;
        partial = F32{};
      }
      transpose_square(a.at(i, e), a.stride, columns[0], kLanes);
      transpose_square(b.at(i, e), b.stride, columns[1], kLanes);
      for (int j = 0; j < kLanes * kLanes; j += kLanes) partial += load(columns[0] + j) * load(columns[1] + j);
    }
    store(to + i, totals + partial);
  }
}

// What a thread works in.
struct Workspace {
  Matrix query, accumulator, dout;    // a part's rows x width; the accumulator holds the output, or dquery
  Matrix scores, dscores;             // a tile's rows x a block's keys
  Matrix key, value, dkey, dvalue;    // a block's keys x width
  Matrix key_columns, value_columns;  // width x a block's keys
  float *maximum, *total;             // a part's rows: of the scores, and of their exponentials
  float *inverse, *delta;             // a part's rows: 1 over the total, and dout . out
  float* memory;
};

Workspace make_workspace(const Problem& problem) {
  const int64_t padded = problem.padded_width();
  const int64_t tile_rows = problem.tile_tokens() * problem.group();
  const int64_t part_rows = (problem.part_tokens() * problem.group() + kLanes - 1) / kLanes * kLanes;
  Workspace space;
  struct Piece {
    float** data;
    int64_t floats;
  };
  const auto rows_of = [&](Matrix& matrix, int64_t rows, int64_t stride) -> Piece {
    matrix.stride = stride;
    return {&matrix.data, rows * stride};
  };
  const Piece pieces[] = {
      rows_of(space.query, part_rows, padded),         rows_of(space.accumulator, part_rows, padded),
      rows_of(space.dout, part_rows, padded),          rows_of(space.scores, tile_rows, kBlockKeys),
      rows_of(space.dscores, tile_rows, kBlockKeys),   rows_of(space.key, kBlockKeys, padded),
      rows_of(space.value, kBlockKeys, padded),        rows_of(space.dkey, kBlockKeys, padded),
      rows_of(space.dvalue, kBlockKeys, padded),       rows_of(space.key_columns, padded, kBlockKeys),
      rows_of(space.value_columns, padded, kBlockKeys), {&space.maximum, part_rows},
      {&space.total, part_rows},                       {&space.inverse, part_rows},
      {&space.delta, part_rows},
  };
  int64_t floats = 0;
  for (const Piece& piece : pieces) floats += (piece.floats + 15) / 16 * 16;
  space.memory = allocate<float>(floats);
  float* next = space.memory;
  for (const Piece& piece : pieces) {
    *piece.data = next;
    next += (piece.floats + 15) / 16 * 16;
  }
  return space;
}

// ---- a tile against a block ----

// scores = rows . keys, from rows x width and width x keys, where a register tile has a key that counts.
void dot_products(const Pair& pair, int64_t width, int64_t depth, Matrix rows, Matrix columns, Matrix scores) {
  for (int64_t n = 0; n < pair.keys;) {
    const int64_t end = n + kLanes * panel_vectors((pair.keys - n + kLanes - 1) / kLanes);
    for (int64_t r = 0; r < pair.rows(); r += kRegisterRows) {
      const int64_t count = smaller(kRegisterRows, pair.rows() - r);
      const Span keys = pair.keys_of({r, r + count});
      const int64_t first = larger(n, keys.begin / kLanes * kLanes);
      const int64_t vectors = (smaller(end, keys.end) - first + kLanes - 1) / kLanes;
      if (vectors <= 0) continue;
      for (int64_t e = 0; e < width; e += depth) {
        multiply<false>(count, vectors, {rows.at(r, e), rows.stride}, columns.from(e, first), scores.from(r, first),
                        smaller(depth, width - e), e > 0);
      }
    }
    n = end;
  }
}

// sums += weights x keys, row by row over the keys that count.
void add_weighted_keys(const Pair& pair, int64_t padded_width, Matrix weights, Matrix keys, Matrix sums) {
  for (int64_t e = 0; e < padded_width;) {
    const int vectors = panel_vectors((padded_width - e) / kLanes);
    for (int64_t r = 0; r < pair.rows(); r += kRegisterRows) {
      const int64_t count = smaller(kRegisterRows, pair.rows() - r);
      const Span span = pair.keys_of({r, r + count});
      if (span.empty()) continue;
      multiply<false>(count, vectors, {weights.at(r, span.begin), weights.stride}, keys.from(span.begin, e),
                      sums.from(r, e), span.end - span.begin, true);
    }
    e += vectors * kLanes;
  }
}

// sums += weights^T x rows, key by key over the rows that see it.
void add_weighted_rows(const Pair& pair, int64_t padded_width, Matrix weights, Matrix rows, Matrix sums) {
  for (int64_t e = 0; e < padded_width;) {
    const int vectors = panel_vectors((padded_width - e) / kLanes);
    for (int64_t k = 0; k < pair.keys; k += kRegisterRows) {
      const int64_t count = smaller(kRegisterRows, pair.keys - k);
      const Span span = pair.rows_of({k, k + count});
      if (span.empty()) continue;
      multiply<true>(count, vectors, {weights.at(span.begin, k), weights.stride}, rows.from(span.begin, e),
                     sums.from(k, e), span.end - span.begin, true);
    }
    e += vectors * kLanes;
  }
}
ALIGNFAST_INLINE F32 where(int64_t first_lane, Span span, F32 x, float otherwise) {
  const I32 lanes = (int32_t)first_lane + lane_numbers();
  return (lanes >= (int32_t)span.begin) & (lanes < (int32_t)span.end) ? x : splat(otherwise);
}

// e^x for x <= 0, no less than e^-87: AVX-512's scaling by 2^n takes 150 cycles for what is below float32's range, as
// the masked scores would be. They are set to 0 afterwards.
ALIGNFAST_INLINE F32 probability(F32 x) { return exp(max(splat(-87.0f), x)); }

// Scaled and capped scores, and their derivative by the raw product.
struct Score {
  F32 value, slope;
};
ALIGNFAST_INLINE Score score_of(const Problem& problem, F32 product) {
  if (problem.softcap == 0.0f) return {product * problem.scale, splat(problem.scale)};
  const Tanh capped = tanh_and_slope(product * (problem.scale / problem.softcap));
  return {capped.value * problem.softcap, capped.slope * problem.scale};
}

// Products of one row to exp(score - maximum), 0 where masked; returns the maximum so far and adds to the total.
void exponentials(const Problem& problem, Span keys, int64_t padded_keys, float* row, float* maximum, float* total,
                  float* accumulator) {
  F32 maxima = splat(*maximum);
  const int64_t begin = keys.begin / kLanes * kLanes;
  for (int64_t n = begin; n < keys.end; n += kLanes) {
    const F32 score = where(n, keys, score_of(problem, load(row + n)).value, -INFINITY);
    store(row + n, score);
    maxima = max(score, maxima);
  }
  const float largest = max_lane(maxima);
  if (largest > *maximum) {
    const float before = *maximum;
    *maximum = largest;
    if (*total != 0.0f) {  // else the row's first keys: nothing to shrink
      const F32 shrink = probability(splat(before - largest));
      *total *= shrink[0];
      for (int64_t e = 0; e < problem.padded_width(); e += kLanes) {
        store(accumulator + e, load(accumulator + e) * shrink);
      }
    }
  }
  F32 totals = {};
  int64_t n = 0;
  for (; n < begin; n += kLanes) store(row + n, F32{});
  for (; n < keys.end; n += kLanes) {
    const F32 p = where(n, keys, probability(load(row + n) - largest), 0.0f);
    store(row + n, p);
    totals += p;
  }
  for (; n < padded_keys; n += kLanes) store(row + n, F32{});
  *total += sum(totals);
}

// Products of one row of queries (scores) and of one row of dout (dscores) to the probabilities and the gradient of
// the raw products, 0 where masked.
void gradients(const Problem& problem, Span keys, int64_t padded_keys, float maximum, float inverse, float delta,
               float* scores, float* dscores) {
  for (int64_t n = 0; n < padded_keys; n += kLanes) {
    if (n + kLanes <= keys.begin || n >= keys.end) {
      store(scores + n, F32{});
      store(dscores + n, F32{});
      continue;
    }
    const Score score = score_of(problem, load(scores + n));
    const F32 p = probability(score.value - maximum) * inverse;
    store(scores + n, where(n, keys, p, 0.0f));
    store(dscores + n, where(n, keys, p * (load(dscores + n) - delta) * score.slope, 0.0f));
  }
}

// ---- a part ----

// Keys of one segment that go by together.
struct Block {
  int64_t start, keys, position;
};

Pair pair_of(const Problem& problem, const Tile& tile, const Block& block) {
  const int64_t position = tile.segment->prompt_length + tile.start - tile.segment->start;
  return {position - block.position, tile.tokens, block.keys, problem.window, problem.group()};
}

// Calls visit(block, first_tile, end_tile) for the blocks of a segment that one of these tiles of a part sees.
template <typename Visit>
void visit_segment(const Problem& problem, const Plan& plan, const Segment& segment, int64_t first_tile,
                   int64_t end_tile, Visit visit) {
  for (int64_t done = 0; done < segment.length; done += kBlockKeys) {
    const Block block = {segment.start + done, smaller(kBlockKeys, segment.length - done),
                         segment.prompt_length + done};
    bool seen = false;
    for (int64_t t = first_tile; t < end_tile && !seen; ++t) seen = !pair_of(problem, plan.tiles[t], block).empty();
    if (seen) visit(block, first_tile, end_tile);
  }
}

// The same for all segments that the part sees: the root of the tree for every tile, the others for their own.
template <typename Visit>
void visit_blocks(const Problem& problem, const Plan& plan, const Tree& tree, const Part& part, Visit visit) {
  const Segment* root = plan.tiles[plan.parts[tree.first_part].first_tile].segment;
  visit_segment(problem, plan, *root, part.first_tile, part.end_tile, visit);
  for (int64_t first = part.first_tile, end = first; first < part.end_tile; first = end) {
    const Segment* segment = plan.tiles[first].segment;
    while (end < part.end_tile && plan.tiles[end].segment == segment) ++end;
    if (segment != root) visit_segment(problem, plan, *segment, first, end, visit);
  }
}

struct Tensors {
  Heads query, key, value, out, dout, dquery, dkey, dvalue;
  float* norms;  // heads x tokens x 2: p = exp(score - norms[0]) * norms[1]
  float* slabs;  // slabs x 2 x tokens x key heads x width: partial dkey and dvalue
  int64_t num_tokens;
};

void load_queries(const Problem& problem, const Heads& from, int64_t start, int64_t tokens, int64_t key_head,
                  Matrix to) {
  load_rows(problem, from, start, tokens, key_head * problem.group(), problem.group(), to);
}

// The block's rows of one key head, then rows of 0 up to a whole vector of keys.
void load_keys(const Problem& problem, const Heads& from, const Block& block, int64_t key_head, Matrix to) {
  load_rows(problem, from, block.start, block.keys, key_head, 1, to);
  clear(to.from(block.keys, 0), -block.keys & (kLanes - 1));
}

void forward_part(const Problem& problem, const Tensors& tensors, const Plan& plan, const Tree& tree, const Part& part,
                  int64_t key_head, const Workspace& space) {
  const int64_t group = problem.group(), padded = problem.padded_width(), rows = part.tokens * group;
  const int64_t start = plan.tiles[part.first_tile].start;
  load_queries(problem, tensors.query, start, part.tokens, key_head, space.query);
  clear(space.accumulator, rows);
  for (int64_t r = 0; r < rows; ++r) {
    space.maximum[r] = -FLT_MAX;  // finite: a row whose scores are all -inf gets exp(-inf) = 0 and a total of 0
    space.total[r] = 0.0f;
  }
  visit_blocks(problem, plan, tree, part, [&](const Block& block, int64_t first_tile, int64_t end_tile) {
    load_keys(problem, tensors.key, block, key_head, space.key);
    load_keys(problem, tensors.value, block, key_head, space.value);
    transpose(space.key, block.keys, padded, space.key_columns);
    for (int64_t t = first_tile; t < end_tile; ++t) {
      const Pair pair = pair_of(problem, plan.tiles[t], block);
      if (pair.empty()) continue;
      const int64_t at = (plan.tiles[t].start - start) * group;
      dot_products(pair, problem.width, kScoreDepth, space.query.from(at, 0), space.key_columns, space.scores);
      for (int64_t r = 0; r < pair.rows(); ++r) {
        exponentials(problem, pair.keys_of({r, r + 1}), block.keys, space.scores.at(r, 0), &space.maximum[at + r],
                     &space.total[at + r], space.accumulator.at(at + r, 0));
      }
      add_weighted_keys(pair, padded, space.scores, space.value, space.accumulator.from(at, 0));
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = start + r / group, head = key_head * group + r % group;
    store_row(problem, space.accumulator.at(r, 0), 1.0f / space.total[r], tensors.out, token, head);
    float* norms = tensors.norms + 2 * (head * tensors.num_tokens + token);
    norms[0] = space.maximum[r];
    norms[1] = 1.0f / space.total[r];
  }
}

// Writes dquery; writes dkey and dvalue (float32), or adds to them.
void backward_part(const Problem& problem, const Tensors& tensors, const Plan& plan, const Tree& tree,
                   const Part& part, int64_t key_head, const Heads& dkey, const Heads& dvalue, bool add,
                   const Workspace& space) {
  const int64_t group = problem.group(), padded = problem.padded_width(), rows = part.tokens * group;
  const int64_t start = plan.tiles[part.first_tile].start;
  load_queries(problem, tensors.query, start, part.tokens, key_head, space.query);
  load_queries(problem, tensors.dout, start, part.tokens, key_head, space.dout);
  load_queries(problem, tensors.out, start, part.tokens, key_head, space.accumulator);
  dot_rows(space.dout, space.accumulator, rows, padded, space.delta);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = start + r / group, head = key_head * group + r % group;
    const float* norms = tensors.norms + 2 * (head * tensors.num_tokens + token);
    space.maximum[r] = norms[0];
    space.inverse[r] = norms[1];
  }
  clear(space.accumulator, rows);
  visit_blocks(problem, plan, tree, part, [&](const Block& block, int64_t first_tile, int64_t end_tile) {
    load_keys(problem, tensors.value, block, key_head, space.key);
    transpose(space.key, block.keys, padded, space.value_columns);
    load_keys(problem, tensors.key, block, key_head, space.key);
    transpose(space.key, block.keys, padded, space.key_columns);
    clear(space.dkey, block.keys);
    clear(space.dvalue, block.keys);
    for (int64_t t = first_tile; t < end_tile; ++t) {
      const Pair pair = pair_of(problem, plan.tiles[t], block);
      if (pair.empty()) continue;
      const int64_t at = (plan.tiles[t].start - start) * group;
      const Matrix query = space.query.from(at, 0), dout = space.dout.from(at, 0);
      dot_products(pair, problem.width, kScoreDepth, query, space.key_columns, space.scores);
      dot_products(pair, problem.width, kGradientDepth, dout, space.value_columns, space.dscores);
      for (int64_t r = 0; r < pair.rows(); ++r) {
        gradients(problem, pair.keys_of({r, r + 1}), block.keys, space.maximum[at + r], space.inverse[at + r],
                  space.delta[at + r], space.scores.at(r, 0), space.dscores.at(r, 0));
      }
      add_weighted_rows(pair, padded, space.scores, dout, space.dvalue);
      add_weighted_rows(pair, padded, space.dscores, query, space.dkey);
      add_weighted_keys(pair, padded, space.dscores, space.key, space.accumulator.from(at, 0));
    }
    for (int64_t k = 0; k < block.keys; ++k) {
      const int64_t at = (block.start + k) * dkey.token_stride + key_head * dkey.head_stride;
      write_row(problem.width, space.dkey.at(k, 0), (float*)dkey.data + at, add);
      write_row(problem.width, space.dvalue.at(k, 0), (float*)dvalue.data + at, add);
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    store_row(problem, space.accumulator.at(r, 0), 1.0f, tensors.dquery, start + r / group,
              key_head * group + r % group);
  }
}

// ---- tasks ----

void run_forward(const Problem& problem, const Tensors& tensors, int64_t threads) {
  const Plan plan = make_plan(problem);
  const int workers = threads_for(plan, problem, threads);
  const int64_t at_once = tasks_at_once(plan, problem, plan.num_parts);
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    const Workspace space = make_workspace(problem);
#pragma omp for schedule(dynamic, at_once)
    for (int64_t task = 0; task < plan.num_parts * problem.num_key_heads; ++task) {
      const Part& part = plan.parts[plan.num_parts - 1 - task / problem.num_key_heads];  // a tree's last cost most
      forward_part(problem, tensors, plan, plan.trees[part.tree], part, task % problem.num_key_heads, space);
    }
    free(space.memory);
  }
  release(plan);
}

// Partial dkey (which = 0) or dvalue (1) of a slab; where there are no slabs, the float32 result itself.
Heads partial(const Problem& problem, const Tensors& tensors, int64_t slab, int64_t which) {
  if (!tensors.slabs) return which ? tensors.dvalue : tensors.dkey;
  const int64_t row = problem.num_key_heads * problem.width;
  return {tensors.slabs + (2 * slab + which) * tensors.num_tokens * row, row, problem.width};
}

void backward_share(const Problem& problem, const Tensors& tensors, const Plan& plan, const Share& share,
                    int64_t key_head, const Workspace& space) {
  const Heads dkey = partial(problem, tensors, share.slab, 0), dvalue = partial(problem, tensors, share.slab, 1);
  const Tree& tree = *share.tree;
  // A tree's only part sees every key once, and writes it; others add, and a share of none leaves zeros.
  const bool add = tree.end_part - tree.first_part > 1 || share.first_part == share.end_part;
  for (int64_t token = tree.start; add && token < tree.start + tree.tokens; ++token) {
    const int64_t at = token * dkey.token_stride + key_head * dkey.head_stride;
    memset((float*)dkey.data + at, 0, problem.width * sizeof(float));
    memset((float*)dvalue.data + at, 0, problem.width * sizeof(float));
  }
  for (int64_t part = share.first_part; part < share.end_part; ++part) {
    backward_part(problem, tensors, plan, tree, plan.parts[part], key_head, dkey, dvalue, add, space);
  }
}

// The slabs of one tree and key head, summed in order into dkey and dvalue.
void sum_slabs(const Problem& problem, const Tensors& tensors, const Tree& tree, int64_t slabs, int64_t key_head,
               const Workspace& space) {
  float* total = space.query.data;
  for (int64_t which = 0; which < 2; ++which) {
    const Heads& to = which ? tensors.dvalue : tensors.dkey;
    for (int64_t token = tree.start; token < tree.start + tree.tokens; ++token) {
      memset(total, 0, problem.width * sizeof(float));
      for (int64_t slab = 0; slab < slabs; ++slab) {
        const Heads from = partial(problem, tensors, slab, which);
        add_row(problem.width, (float*)from.data + token * from.token_stride + key_head * from.head_stride, total);
      }
      store_row(problem, total, 1.0f, to, token, key_head);
    }
  }
}

void run_backward(const Problem& problem, const Tensors& tensors, int64_t slabs, int64_t threads) {
  const Plan plan = make_plan(problem);
  const int workers = threads_for(plan, problem, threads);
  Share* shares = allocate<Share>(plan.num_trees * slabs);
  const int64_t num_shares = make_shares(plan, slabs, shares);
  const int64_t at_once = tasks_at_once(plan, problem, num_shares);
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    const Workspace space = make_workspace(problem);
#pragma omp for schedule(dynamic, at_once)
    for (int64_t task = 0; task < num_shares * problem.num_key_heads; ++task) {
      const Share& share = shares[task / problem.num_key_heads];
      backward_share(problem, tensors, plan, share, task % problem.num_key_heads, space);
    }
    if (tensors.slabs) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < plan.num_trees * problem.num_key_heads; ++task) {
        const Tree& tree = plan.trees[task / problem.num_key_heads];
        const int64_t own = slabs_of(plan, tree, slabs);
        sum_slabs(problem, tensors, tree, own, task % problem.num_key_heads, space);
      }
    }
    free(space.memory);
  }
  free(shares);
  release(plan);
}

// ---- what Python calls ----

Heads heads_of(const Tensor<3>& tensor) { return {tensor.data, tensor.strides[0], tensor.strides[1]}; }

Problem problem_of(const Tensor<3>& query, const Tensor<3>& key, const Tensor<2>& segments, double scale,
                   int64_t window, double softcap) {
  return {query.dtype,      query.sizes[1], key.sizes[1], query.sizes[2], (const Segment*)segments.data,
          segments.sizes[0], window,         (float)scale, (float)softcap};
}

}  // namespace

static void packed_attention_forward(Tensor<3> query, Tensor<3> key, Tensor<3> value, Tensor<2> segments, double scale,
                                     int64_t window, double softcap, Tensor<3> out, Tensor<3> norms, int64_t threads) {
  Tensors tensors = {};
  tensors.query = heads_of(query);
  tensors.key = heads_of(key);
  tensors.value = heads_of(value);
  tensors.out = heads_of(out);
  tensors.norms = (float*)norms.data;
  tensors.num_tokens = query.sizes[0];
  run_forward(problem_of(query, key, segments, scale, window, softcap), tensors, threads);
}
// Writes into count[0] how many slabs the backward wants; each is 2 x tokens x key heads x width floats.
static void packed_attention_slabs(Tensor<3> query, Tensor<3> key, Tensor<2> segments, int64_t window, Tensor<1> count,
                                   int64_t threads) {
  const Problem problem = problem_of(query, key, segments, 1.0, window, 0.0);
  const Plan plan = make_plan(problem);
  *(int64_t*)count.data = slabs_for(plan, problem, threads);
  release(plan);
}
// There may be no slabs where one suffices and the gradients are float32.
static void packed_attention_backward(Tensor<3> dout, Tensor<3> query, Tensor<3> key, Tensor<3> value, Tensor<3> out,
                                      Tensor<3> norms, Tensor<2> segments, double scale, int64_t window, double softcap,
                                      Tensor<5> slabs, Tensor<3> dquery, Tensor<3> dkey, Tensor<3> dvalue,
                                      int64_t threads) {
  const Tensors tensors = {heads_of(query),  heads_of(key),    heads_of(value), heads_of(out),
                           heads_of(dout),   heads_of(dquery), heads_of(dkey),  heads_of(dvalue),
                           (float*)norms.data, slabs.sizes[0] ? (float*)slabs.data : nullptr,
                           query.sizes[0]};
  run_backward(problem_of(query, key, segments, scale, window, softcap), tensors, larger(1, slabs.sizes[0]), threads);
}

}  // namespace alignfast::ALIGNFAST_ISA

ALIGNFAST_EXPORT(packed_attention_forward)
ALIGNFAST_EXPORT(packed_attention_slabs)
ALIGNFAST_EXPORT(packed_attention_backward)
