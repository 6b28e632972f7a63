// Bf16Output: a bf16 matrix that an epilogue writes, in pieces of 64 rows by at most BOX columns. Whole pieces leave by
// TMA; where there is none, rows end inside a fragment, or fewer than BOX columns are left of a tile, the threads copy the valid
// 16-byte chunks themselves. StoreBf16: the epilogue out[row, column] = bf16(d), assigned.
#pragma once
#include "gemm_epilogue.cuh"

namespace ROUTEGRAD_VARIANT {

struct Bf16Output {
  TensorMap map;  // (width, parts, rows), boxes of BOX x 1 x 64
  bf16* out;      // [rows, parts, width]: parts side by side in a row, each clipped at its own width
  int width, parts;

  // One piece at `column` of `part`. pair(j, h) packs the thread's two elements of row h in the j-th 8 columns.
  template <int PIECE, class Port, class Pair>
  DEV void store(const Fragment& at, int column, int part, Port& staging, const Pair& pair) const {
    uint8_t* buffer = staging.acquire();
#pragma unroll
    for (int j = 0; j < PIECE / 8; j += 2) {
      const bool both = j + 1 < PIECE / 8;
      staging.put(buffer, j, pair(j, 0), pair(j, 1), both ? pair(j + 1, 0) : 0, both ? pair(j + 1, 1) : 0);
    }
    staging.publish();
    if constexpr (Port::kTma) {
      if (leaves_by_tma<PIECE>(at)) {
        if (staging.issuer()) tma_store_3d(&map, buffer, column, part, at.first_row);
      } else {
        copy_out<PIECE>(buffer, at, column, part);
      }
    } else {
      copy_out<PIECE>(buffer, at, column, part);
    }
    staging.commit();
  }

  template <int PIECE, int BOX = 64>
  DEV static bool leaves_by_tma(const Fragment& at) {
    return at.rows == 64 && PIECE == BOX;
  }

  // A piece from `buffer`, by all threads of the warpgroup.
  template <int PIECE, int BOX = 64>
  DEV void copy_out(const uint8_t* buffer, const Fragment& at, int column, int part) const {
    constexpr int kChunks = BOX / 8, kRows = 128 / kChunks;  // copied at a time
    const int chunk = threadIdx.x % kChunks;
    if (chunk * 8 >= PIECE || column + chunk * 8 >= width) return;
#pragma unroll
    for (int i = 0; i < 64 / kRows; ++i) {
      const int row = threadIdx.x % 128 / kChunks + kRows * i;
      const int64_t place = (static_cast<int64_t>(at.first_row + row) * parts + part) * width + column + chunk * 8;
      if (row < at.rows)
        st_global(reinterpret_cast<uint4*>(out + place),
                  *reinterpret_cast<const uint4*>(buffer + staging_byte<BOX>(row, chunk)));
    }
  }
};

struct StoreBf16 : PlainEpilogue {
  Bf16Output out;

  template <int COLUMNS, int FIRST = 0, class Port>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Port& staging) const {
    constexpr int kPiece = piece_columns(COLUMNS, FIRST);
    const int column = at.first_column + FIRST;
    if (column >= out.width) return;
    out.store<kPiece>(at, column, 0, staging, [&](int j, int h) {
      const float* v = d + FIRST / 2 + 4 * j + 2 * h;
      return pack_bf16(v[0], v[1]);
    });
    if constexpr (FIRST + 64 < COLUMNS) store<COLUMNS, FIRST + 64>(d, at, staging);
  }
};

}  // namespace ROUTEGRAD_VARIANT
