// Epilogue: out[group, row, column] = d or += d, f32, by TMA (which clips rows and columns; the addition happens in L2,
// once per element and launch, so its result does not depend on order).
#pragma once
#include "gemm_epilogue.cuh"

namespace ROUTEGRAD_VARIANT {

struct StoreF32 : PlainEpilogue {
  static constexpr bool kForMma = false;
  TensorMap map;  // (columns, rows, groups), boxes of 32 x 64 x 1
  int width;
  bool accumulate;

  template <int COLUMNS>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Staging& staging) const {
#pragma unroll
    for (int first = 0; first < COLUMNS; first += 32) store_piece(d + first / 2, at, first, staging);
  }

  // 32 columns, from column `first` of the fragment on. d: the thread's values there.
  DEV void store_piece(const float* d, const Fragment& at, int first, Staging& staging) const {
    const int quad = threadIdx.x % 4, column = at.first_column + first;
    if (column >= width) return;
    uint8_t* buffer = staging.acquire();
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(buffer + staging_byte(at.local_row(h), 2 * j + quad / 2) + quad % 2 * 8) =
            make_float2(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]);
    staging.publish();
    if (staging.issuer()) {
      if (accumulate)
        tma_reduce_add_3d(&map, buffer, column, at.first_row, at.group);
      else
        tma_store_3d(&map, buffer, column, at.first_row, at.group);
    }
    staging.commit();
  }
};

// The same on GPUs without TMA, by the threads: four lanes of a row write 32 bytes.
struct MmaStoreF32 : PlainEpilogue {
  float* out;  // [groups, rows, width]
  int rows, width;
  bool accumulate;

  template <int COLUMNS>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, MmaStaging&) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (at.local_row(h) >= at.rows) continue;
      float* const row = out + (static_cast<int64_t>(at.group) * rows + at.row(h)) * width;
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
        if (at.column(j) >= width) break;
        auto* const to = reinterpret_cast<float2*>(row + at.column(j));
        float2 v = make_float2(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]);
        if (accumulate) {
          const float2 before = ld_global(to);
          v = make_float2(before.x + v.x, before.y + v.y);
        }
        st_global(to, v);
      }
    }
  }
};

}  // namespace ROUTEGRAD_VARIANT
