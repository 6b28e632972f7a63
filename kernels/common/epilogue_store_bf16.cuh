// Epilogue: out[row, column] = bf16(d), assigned. Whole 64 x 64 pieces leave by TMA; where rows end inside a fragment,
// or fewer than 64 columns are left of a tile, the threads copy the valid 16-byte chunks themselves.
#pragma once
#include "gemm_epilogue.cuh"

namespace ROUTEGRAD_VARIANT {

struct StoreBf16 {
  TensorMap map;  // (columns, rows, 1), boxes of 64 x 64
  bf16* out;      // [rows, width]
  int width;

  template <int COLUMNS, int FIRST = 0>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Staging& staging) const {
    constexpr int kPiece = COLUMNS - FIRST < 64 ? COLUMNS - FIRST : 64;
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, column = at.first_column + FIRST;
    if (column >= width) return;
    uint8_t* buffer = staging.acquire();
    // Per 16 columns of the warp's 16 rows: four 8 x 8 matrices, (rows 0 and 8) of columns 0, then of columns 8.
#pragma unroll
    for (int j = 0; j < kPiece / 8; j += 2) {
      const float* v = d + FIRST / 2 + 4 * j;
      stmatrix_x4(buffer + Staging::byte(warp * 16 + lane % 16, j + lane / 16), pack_bf16(v[0], v[1]),
                  pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
    staging.publish();
    if (at.rows == 64 && kPiece == 64) {
      if (staging.issuer()) tma_store_3d(&map, buffer, column, at.first_row, 0);
    } else {
      copy_out(buffer, at, column, kPiece);
    }
    staging.commit();
    if constexpr (FIRST + 64 < COLUMNS) store<COLUMNS, FIRST + 64>(d, at, staging);
  }

 private:
  DEV void copy_out(const uint8_t* buffer, const Fragment& at, int column, int columns) const {
    const int chunk = threadIdx.x % 8;
    if (chunk * 8 >= columns || column + chunk * 8 >= width) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.x % 128 / 8 + 16 * i;
      if (row < at.rows)
        st_global(reinterpret_cast<uint4*>(out + static_cast<int64_t>(at.first_row + row) * width + column + chunk * 8),
                  *reinterpret_cast<const uint4*>(buffer + Staging::byte(row, chunk)));
    }
  }
};

}  // namespace ROUTEGRAD_VARIANT
