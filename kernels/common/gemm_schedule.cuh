// Which output tile next: the walk that every warp of a persistent grouped GEMM makes for itself.
//
// Block b of G takes tiles b, b + G, b + 2 G, …; nothing is communicated, and the order is a function of the sizes and
// the offsets alone.
//   RaggedM  the rows of the output are cut by `offsets` (forward, input gradient); no offsets: one group, the dense
//   GEMM RaggedK  the reduction is cut by `offsets`, the output is [groups, rows, columns] (weight gradient)
#pragma once
#include "simt.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kGemmDepth = 64;  // k of a k-tile: one 128-byte swizzle span of bf16

struct Tile {
  int group, group_row;  // and its first row of the output (ragged reduction: 0)
  int row, rows;         // first row of the output, and how many from there belong to the tile
  int column;            // first column
  int first_k, last_k;   // the reduction, [first_k, last_k)

  HOST_DEV int depth_steps() const { return (last_k - first_k + kGemmDepth - 1) / kGemmDepth; }
};

HOST_DEV constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tiles of a group in bands of `band` tile rows, column by column within a band: the blocks that run together then read
// few distinct rows and columns, which stay in L2.
struct Place {
  int row_tile, column_tile;
};
HOST_DEV constexpr Place place_in_bands(int index, int row_tiles, int column_tiles, int band) {
  const int first = index / (band * column_tiles) * band;
  const int height = row_tiles - first < band ? row_tiles - first : band;
  const int within = index - first * column_tiles;
  return {first + within % height, within / height};
}

constexpr int kBandRows = 2048;  // output rows of a band

template <int TILE_ROWS, int TILE_COLUMNS>
struct RaggedM {
  static constexpr bool kRaggedDepth = false;
  const int32_t* offsets;  // [groups + 1], device; null: one group of `rows` rows
  int groups, rows, columns, depth;

  struct Walk {
    const RaggedM& shape;
    int index = blockIdx.x;     // of the next tile
    int group = 0, before = 0;  // tiles of earlier groups
    DEV explicit Walk(const RaggedM& s) : shape(s) {}

    DEV bool next(Tile& tile) {
      const int column_tiles = ceil_div(shape.columns, TILE_COLUMNS);
      for (; group < shape.groups; ++group) {
        const int first = shape.offsets ? ld_global_readonly(shape.offsets + group) : 0;
        const int last = shape.offsets ? ld_global_readonly(shape.offsets + group + 1) : shape.rows;
        const int row_tiles = ceil_div(last - first, TILE_ROWS), tiles = row_tiles * column_tiles;
        if (index < before + tiles) {
          const Place place = place_in_bands(index - before, row_tiles, column_tiles, kBandRows / TILE_ROWS);
          const int row = first + place.row_tile * TILE_ROWS;
          tile = {
              group, first,      row, last - row < TILE_ROWS ? last - row : TILE_ROWS, place.column_tile * TILE_COLUMNS,
              0,     shape.depth};
          index += gridDim.x;
          return true;
        }
        before += tiles;
      }
      return false;
    }
  };
};

template <int TILE_ROWS, int TILE_COLUMNS>
struct RaggedK {
  static constexpr bool kRaggedDepth = true;
  const int32_t* offsets;  // [groups + 1], device; null: one group of `depth`
  int groups, rows, columns, depth;
  bool skip_empty = false;  // when nothing is to be added to the output of an empty group

  struct Walk {
    const RaggedK& shape;
    int64_t index = blockIdx.x;
    DEV explicit Walk(const RaggedK& s) : shape(s) {}

    DEV bool next(Tile& tile) {
      const int row_tiles = ceil_div(shape.rows, TILE_ROWS), column_tiles = ceil_div(shape.columns, TILE_COLUMNS);
      const int64_t tiles = static_cast<int64_t>(row_tiles) * column_tiles;
      for (; index < tiles * shape.groups; index += gridDim.x) {
        const int group = static_cast<int>(index / tiles);
        const int first = shape.offsets ? ld_global_readonly(shape.offsets + group) : 0;
        const int last = shape.offsets ? ld_global_readonly(shape.offsets + group + 1) : shape.depth;
        if (shape.skip_empty && first == last) continue;
        const Place place =
            place_in_bands(static_cast<int>(index % tiles), row_tiles, column_tiles, kBandRows / TILE_ROWS);
        const int row = place.row_tile * TILE_ROWS;
        tile = {group,
                0,
                row,
                shape.rows - row < TILE_ROWS ? shape.rows - row : TILE_ROWS,
                place.column_tile * TILE_COLUMNS,
                first,
                last};
        index += gridDim.x;
        return true;
      }
      return false;
    }
  };
};

}  // namespace ROUTEGRAD_VARIANT
