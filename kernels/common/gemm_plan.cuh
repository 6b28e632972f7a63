// Which tile and schedule a product gets: a pure function of its sizes, from an estimate of its clocks on one H200.
// Group sizes live on the device, so the rows are taken as evenly spread. The constants are reckoned from the data
// sheet (wgmma m64nNk16: N / 2 clocks) and from published bandwidths; they rank tiles, they do not predict times.
#pragma once
#include "gemm_schedule.cuh"

namespace ROUTEGRAD_VARIANT {

struct TileShape {
  int tile;        // routegrad_gemm_tile
  int row_blocks;  // products of 64 rows per consumer warpgroup
  int columns;
  bool pingpong;
  constexpr int rows() const { return row_blocks * (pingpong ? 64 : 128); }
};
constexpr TileShape kTileShapes[] = {
    {ROUTEGRAD_TILE_COOPERATIVE_128X256, 1, 256, false}, {ROUTEGRAD_TILE_COOPERATIVE_256X128, 2, 128, false},
    {ROUTEGRAD_TILE_COOPERATIVE_256X176, 2, 176, false}, {ROUTEGRAD_TILE_PINGPONG_128X128, 2, 128, true},
    {ROUTEGRAD_TILE_PINGPONG_128X176, 2, 176, true},
};
constexpr int kTileShapeCount = sizeof(kTileShapes) / sizeof(kTileShapes[0]);

// For GPUs without wgmma: as many stages as 99 KB hold (compute capability 8.6, 8.9, 12.0), and twice the rows where a block
// may have 163 KB (8.0, 10.0).
constexpr TileShape kMmaTileShapes[] = {
    {ROUTEGRAD_TILE_MMA_128X128, 1, 128, false},
    {ROUTEGRAD_TILE_MMA_256X128, 2, 128, false},
};
constexpr int kMmaStages = 3;
constexpr int mma_stage_bytes(const TileShape& t) { return (t.rows() + t.columns) * kGemmDepth * 2; }
static_assert(mma_stage_bytes(kMmaTileShapes[0]) * kMmaStages + 1024 <= 99 * 1024);
static_assert(mma_stage_bytes(kMmaTileShapes[1]) * kMmaStages + 1024 <= 163 * 1024);

// B is K-major when its rows are the output's columns.
constexpr bool b_is_mn_major(int product) {
  return product == ROUTEGRAD_GEMM_INPUT_GRADIENT || product == ROUTEGRAD_GEMM_WEIGHT_GRADIENT ||
         product == ROUTEGRAD_GEMM_SWIGLU_BACKWARD;
}

// 227 KB of shared memory, less the epilogue's buffers of 8 KB per warpgroup, barriers and room to align.
constexpr int tile_stages(const TileShape& t, int product) {
  const int buffers = product == ROUTEGRAD_GEMM_SWIGLU_BACKWARD ? 6 : 2;
  const int columns = b_is_mn_major(product) ? (t.columns + 63) / 64 * 64 : t.columns;
  const int stages = (227 * 1024 - 2 * buffers * 8 * 1024 - 2 * 1024 - 128) / ((t.rows() + columns) * kGemmDepth * 2);
  return stages < 8 ? stages : 8;
}

// The output is [rows, columns] per group, or in all where the rows are ragged. Gate and up count as columns each.
struct ProductSizes {
  bool ragged_depth;
  int64_t rows, columns, depth;  // ragged: the sum over the groups
  int groups;
  int epilogue_bytes;  // moved per element of the output
};
inline ProductSizes product_sizes(int product, int64_t rows, int experts, int n, int k) {
  switch (product) {
    case ROUTEGRAD_GEMM_SWIGLU_FORWARD:
      return {false, rows, n, k, experts, 3};  // h, and half as many of a
    case ROUTEGRAD_GEMM_INPUT_GRADIENT:
      return {false, rows, k, n, experts, 2};
    case ROUTEGRAD_GEMM_SWIGLU_BACKWARD:
      return {false, rows, k, n, experts, 10};  // h, dh and scaled_a
    case ROUTEGRAD_GEMM_WEIGHT_GRADIENT:
      return {true, n, k, rows, experts, 4};
    case ROUTEGRAD_GEMM_HEAD_FORWARD:
      return {false, rows, n, k, experts, 4};
    default:
      return {false, rows, n, k, experts, 2};
  }
}

// The kernels that are compiled; a fused epilogue costs registers, shared memory and time to build.
constexpr bool tile_serves(const TileShape& t, int product) {
  switch (product) {
    case ROUTEGRAD_GEMM_WEIGHT_GRADIENT:
      return t.columns % 64 == 0;
    case ROUTEGRAD_GEMM_SWIGLU_FORWARD:
      return t.columns == 256 || t.columns == 176;
    case ROUTEGRAD_GEMM_DOWN_FORWARD:
    case ROUTEGRAD_GEMM_HEAD_FORWARD:
      return t.columns == 256 || (t.columns == 128 && t.pingpong);
    case ROUTEGRAD_GEMM_SWIGLU_BACKWARD:
      // A long epilogue, hidden behind the other warpgroup's products. With more columns the accumulators leave too few registers
      // to have more than one element's chain of exponential and reciprocal under way.
      return t.pingpong && t.columns == 128;
    default:
      return true;
  }
}

constexpr int64_t ceil_div_wide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Output tiles, at most, whatever the group sizes are.
constexpr int64_t most_tiles(const TileShape& t, const ProductSizes& p) {
  const int64_t column_tiles = ceil_div_wide(p.columns, t.columns);
  if (p.ragged_depth) return p.groups * ceil_div_wide(p.rows, t.rows()) * column_tiles;
  return (p.rows / t.rows() + (p.groups < p.rows ? p.groups : p.rows)) * column_tiles;
}

constexpr int64_t estimate_clocks(const TileShape& t, const ProductSizes& p, int multiprocessors) {
  constexpr int kLoadBytesPerClock = 48;   // L2 to one multiprocessor, all reading
  constexpr int kStoreBytesPerClock = 48;  // registers to L2, through the staging buffers
  constexpr int kTileClocks = 600;         // latencies that a cooperative tile cannot hide
  const int64_t groups = p.ragged_depth || p.groups < p.rows ? p.groups : p.rows;
  const int64_t rows = p.ragged_depth ? p.rows : ceil_div_wide(p.rows, groups);
  const int64_t depth = p.ragged_depth ? ceil_div_wide(p.depth, groups) : p.depth;
  const int64_t row_tiles = ceil_div_wide(rows, t.rows());
  const int64_t tiles = groups * row_tiles * ceil_div_wide(p.columns, t.columns);
  // Products of 64 rows in a tile, on average, in 64ths: a tail costs only what it holds.
  const int64_t row_blocks_64 = ceil_div_wide(rows, 64) * 64 / row_tiles;
  const int64_t steps = ceil_div_wide(depth, kGemmDepth);
  const int64_t multiply = row_blocks_64 * 2 * t.columns / 64;
  const int64_t load = (row_blocks_64 + t.columns) * kGemmDepth * 2 / kLoadBytesPerClock;
  const int64_t mainloop = steps * (multiply > load ? multiply : load);
  const int64_t store = row_blocks_64 * t.columns * p.epilogue_bytes / kStoreBytesPerClock;
  // Pingpong hides one warpgroup's store behind the other's products.
  const int64_t overlapped = (mainloop + store) / 2;
  const int64_t tile = t.pingpong ? (mainloop > overlapped ? mainloop : overlapped) : mainloop + store + kTileClocks;
  return ceil_div_wide(tiles, multiprocessors) * tile + kTileClocks;
}

inline bool mma_tile_fits(const TileShape& t) { return max_shared() >= mma_stage_bytes(t) * kMmaStages + 1024; }
// The larger tile reads B half as often: where it fits, and leaves work for every multiprocessor.
inline const TileShape& choose_mma_tile(const ProductSizes& p, int multiprocessors) {
  const bool fits = mma_tile_fits(kMmaTileShapes[1]);
  const int64_t row_tiles = p.ragged_depth ? p.groups * ceil_div_wide(p.rows, kMmaTileShapes[1].rows())
                                           : ceil_div_wide(p.rows, kMmaTileShapes[1].rows());
  return kMmaTileShapes[fits && row_tiles * ceil_div_wide(p.columns, kMmaTileShapes[1].columns) >= multiprocessors];
}

// Of a tile that serves the product on the current device.
constexpr int stages_of(const TileShape& t, int product) {
  return t.tile < ROUTEGRAD_TILE_MMA_128X128 ? tile_stages(t, product) : kMmaStages;
}

// The tile on GPUs without wgmma, where there is such a one; every product has it.
inline const TileShape* find_mma_tile(int tile) {
  for (const TileShape& t : kMmaTileShapes)
    if (t.tile == tile && mma_tile_fits(t)) return &t;
  return nullptr;
}

inline const TileShape& choose_tile(int product, const ProductSizes& p, int multiprocessors) {
  if constexpr (kForAmpere)
    if (!on_hopper()) return choose_mma_tile(p, multiprocessors);
  const TileShape* best = nullptr;
  for (const TileShape& t : kTileShapes)
    if (tile_serves(t, product) &&
        (!best || estimate_clocks(t, p, multiprocessors) < estimate_clocks(*best, p, multiprocessors)))
      best = &t;
  return *best;
}

}  // namespace ROUTEGRAD_VARIANT
