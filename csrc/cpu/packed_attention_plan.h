// How the attention of a packed row is cut into pieces that threads do on their own.
//
// A tile is a run of queries of one segment, a part a run of a tree's tiles. A task is
//   forward   a part and a key head;
//   backward  a tree and a key head, since all its parts add to the same dk and dv. Where a tree is so much of the
//             work that threads would wait for it, its parts are shared out to several tasks, each adding to a slab of
//             its own; the slabs are summed at the end.
// Which thread takes which task changes nothing, so results repeat bit for bit at a given number of threads.
#pragma once

#include <stdio.h>
#include <stdlib.h>

#include "simd.h"

namespace alignfast::ALIGNFAST_ISA {
namespace {

constexpr int64_t kTileQueries = 96;           // queries of a tile times G; one token's where G is more
constexpr int64_t kPartFloats = 32 * 1024;  // rows of a part times width: 128 KB each for queries and accumulator
constexpr double kParallelWork = 1e7;       // multiply-adds below which one thread does all: a fifth of a millisecond
constexpr double kTaskWork = 1e6;           // multiply-adds below which a thread takes all heads of a tree in one go
constexpr int64_t kMostSlabs = 8;

ALIGNFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ALIGNFAST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
ALIGNFAST_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return larger(low, smaller(x, high)); }

// A row of PackedLayout.segments_S4. A tree begins with the segment that has no prompt.
struct Segment {
  int32_t start, length, prompt_start, prompt_length;
};

struct Problem {
  int64_t dtype, num_heads, num_key_heads, width;
  const Segment* segments;
  int64_t num_segments, window;  // window 0: none
  float scale, softcap;          // softcap 0: none

  int64_t group() const { return num_heads / num_key_heads; }
  int64_t padded_width() const { return (width + kLanes - 1) / kLanes * kLanes; }
  int64_t tile_tokens() const { return larger(1, kTileQueries / group()); }
  int64_t part_tokens() const { return larger(tile_tokens(), kPartFloats / (padded_width() * group())); }
};

struct Tile {
  const Segment* segment;
  int64_t start, tokens;
};
struct Part {
  int64_t tree, first_tile, end_tile, tokens;
  double work;
};
struct Tree {
  int64_t first_part, end_part, start, tokens;
  double work;
};
// What a backward task does for each key head.
struct Share {
  const Tree* tree;
  int64_t first_part, end_part, slab;
};
struct Plan {
  Tile* tiles;
  Part* parts;
  Tree* trees;
  int64_t num_tiles, num_parts, num_trees;
  double work, largest_tree_work;  // for one key head
};

template <typename T>
T* allocate(int64_t count) {
  void* memory = aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64);
  if (!memory) {
    fprintf(stderr, "alignfast: packed_attention has no memory for %lld bytes\n", (long long)(count * sizeof(T)));
    abort();  // an exception would have to cross threads and C; with this little memory nothing else runs either
  }
  return (T*)memory;
}

// About the multiply-adds of a tile's forward, for one key head; moving its rows costs as much as 32 keys.
double work_of(const Problem& problem, const Tile& tile) {
  double keys = tile.segment->prompt_length + (tile.start - tile.segment->start) + 0.5 * tile.tokens;
  if (problem.window && keys > problem.window) keys = problem.window;
  return 2.0 * (keys + 32.0) * tile.tokens * problem.group() * problem.width;
}

void add_tile(Plan& plan, const Problem& problem, const Tile& tile) {
  Tree& tree = plan.trees[plan.num_trees - 1];
  const bool full = tree.first_part == tree.end_part ||
                    plan.parts[plan.num_parts - 1].tokens + tile.tokens > problem.part_tokens();
  if (full) {
    plan.parts[plan.num_parts++] = {plan.num_trees - 1, plan.num_tiles, plan.num_tiles, 0, 0.0};
  }
  plan.tiles[plan.num_tiles++] = tile;
  const double work = work_of(problem, tile);
  Part& part = plan.parts[plan.num_parts - 1];
  part.end_tile = plan.num_tiles;
  part.tokens += tile.tokens;
  part.work += work;
  tree.end_part = plan.num_parts;
  tree.tokens += tile.tokens;
  tree.work += work;
  plan.work += work;
  if (tree.work > plan.largest_tree_work) plan.largest_tree_work = tree.work;
}

Plan make_plan(const Problem& problem) {
  const int64_t tile_tokens = problem.tile_tokens();
  int64_t most = 0;
  for (int64_t s = 0; s < problem.num_segments; ++s) most += problem.segments[s].length / tile_tokens + 1;
  Plan plan = {};
  plan.tiles = allocate<Tile>(most);
  plan.parts = allocate<Part>(most);
  plan.trees = allocate<Tree>(most);
  for (int64_t s = 0; s < problem.num_segments; ++s) {
    const Segment& segment = problem.segments[s];
    if (segment.prompt_length == 0) {
      plan.trees[plan.num_trees++] = {plan.num_parts, plan.num_parts, segment.start, 0, 0.0};
    }
    for (int64_t done = 0; done < segment.length; done += tile_tokens) {
      add_tile(plan, problem, {&segment, segment.start + done, smaller(tile_tokens, segment.length - done)});
    }
  }
  return plan;
}

void release(const Plan& plan) {
  free(plan.tiles);
  free(plan.parts);
  free(plan.trees);
}

// One or all: OpenMP ends and starts threads when their number changes.
int threads_for(const Plan& plan, const Problem& problem, int64_t threads) {
  return plan.work * problem.num_key_heads < kParallelWork ? 1 : (int)threads;
}

// Tasks that a thread takes at once. The heads of a short segment lie in one another's cache lines and pages.
int64_t tasks_at_once(const Plan& plan, const Problem& problem, int64_t runs) {
  return plan.work < kTaskWork * runs ? problem.num_key_heads : 1;
}

// Into how many tasks a key head of the largest tree is cut in the backward, so that each is at most half a thread's
// share of the work.
int64_t slabs_for(const Plan& plan, const Problem& problem, int64_t threads) {
  threads = threads_for(plan, problem, threads);
  if (threads == 1 || plan.work == 0.0) return 1;
  const double share = plan.largest_tree_work / (plan.work * problem.num_key_heads);
  return clamp((int64_t)(2 * threads * share + 0.999), 1, kMostSlabs);
}

// The slabs of one tree, where the largest has `slabs`.
int64_t slabs_of(const Plan& plan, const Tree& tree, int64_t slabs) {
  return clamp((int64_t)(slabs * tree.work / plan.largest_tree_work + 0.999), 1, slabs);
}

// Cuts every tree's parts into runs of like work, one for each of its slabs; `shares` has room for trees x slabs.
int64_t make_shares(const Plan& plan, int64_t slabs, Share* shares) {
  int64_t count = 0;
  for (const Tree* tree = plan.trees; tree < plan.trees + plan.num_trees; ++tree) {
    const int64_t own = slabs_of(plan, *tree, slabs);
    double done = 0.0;
    int64_t part = tree->first_part;
    for (int64_t slab = 0; slab < own; ++slab) {
      const int64_t first = part;
      for (; part < tree->end_part && (slab == own - 1 || done < tree->work * (slab + 1) / own); ++part) {
        done += plan.parts[part].work;
      }
      shares[count++] = {tree, first, part, slab};
    }
  }
  return count;
}

}  // namespace
}  // namespace alignfast::ALIGNFAST_ISA
