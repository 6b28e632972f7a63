// Epilogue of the down projection: out = bf16(d), assigned, and beside it for each block of 64 rows of an expert the
// column sums Σ_r w_r d[r, :] of the f32 sums before rounding, w_r the row's gate: what the mean of an expert's outputs
// is made of.
//
// Order of a sum: rows r and r + 8 of a warp in a thread; then the warp's 8 lanes of a column by halves (16, 8, 4);
// then warps 0 to 3. The same for every tile shape.
#pragma once
#include "epilogue_store_bf16.cuh"
#include "row_gates.cuh"

namespace ROUTEGRAD_VARIANT {

struct StoreAndSumColumns : PlainEpilogue {
  StoreBf16 rows;
  RowGates gates;
  float* sums;  // [blocks, width]: block offsets[e] / 64 + e + b for the b-th 64 rows of expert e; or null

  template <int COLUMNS, class Port>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Port& staging) const {
    rows.store<COLUMNS>(d, at, staging);
    if (sums) sum_columns<COLUMNS>(d, at, staging);
  }

 private:
  template <int COLUMNS, class Port>
  DEV void sum_columns(const float (&d)[COLUMNS / 2], const Fragment& at, Port& staging) const {
    static_assert(COLUMNS % 32 == 0 && 4 * COLUMNS * sizeof(float) <= kStagingBytes);
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    float w[2];
    gates.look_up(w, at);
    auto* partial = reinterpret_cast<float*>(staging.acquire());  // [4 warps, COLUMNS]
#pragma unroll
    for (int first = 0; first < COLUMNS; first += 32) {
      // The thread's 8 columns of these 32, as Fragment::column has them; rows past the end may hold NaN.
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float* rows_of = d + first / 2 + i / 2 * 4 + i % 2;
        v[i] =
            (at.local_row(0) < at.rows ? w[0] * rows_of[0] : 0) + (at.local_row(1) < at.rows ? w[1] * rows_of[2] : 0);
      }
      // By halves: a lane keeps one half of its columns and gives the other away, until it has one, of 8 lanes.
#pragma unroll
      for (int half = 4; half; half /= 2) {
        const bool upper = lane & 4 * half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const float given = __shfl_xor_sync(~0u, upper ? v[i] : v[i + half], 4 * half);
          v[i] = (upper ? v[i + half] : v[i]) + given;
        }
      }
      const int kept = lane / 4;
      partial[warp * COLUMNS + first + kept / 2 * 8 + lane % 4 * 2 + kept % 2] = v[0];
    }
    staging.publish();
    const int64_t block = at.group_row / 64 + at.group + (at.first_row - at.group_row) / 64;
#pragma unroll
    for (int c = threadIdx.x % 128; c < COLUMNS; c += 128) {
      const float sum = partial[c] + partial[COLUMNS + c] + partial[2 * COLUMNS + c] + partial[3 * COLUMNS + c];
      if (at.first_column + c < rows.out.width) st_global(sums + block * rows.out.width + at.first_column + c, sum);
    }
    staging.commit();
  }
};

}  // namespace ROUTEGRAD_VARIANT
