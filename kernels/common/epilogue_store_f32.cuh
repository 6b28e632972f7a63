// Epilogue: out[group, row, column] = d or += d, f32, by TMA (which clips rows and columns; the addition happens in L2,
// once per element and launch, so its result does not depend on order).
#pragma once
#include "gemm_epilogue.cuh"

namespace ROUTEGRAD_VARIANT {

struct StoreF32 : PlainEpilogue {
  TensorMap map;  // (columns, rows, groups), boxes of 32 x 64 x 1
  int width;
  bool accumulate;

  template <int COLUMNS, int FIRST = 0>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Staging& staging) const {
    const int quad = threadIdx.x % 4, column = at.first_column + FIRST;
    if (column >= width) return;
    uint8_t* buffer = staging.acquire();
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(buffer + Staging::byte(at.local_row(h), 2 * j + quad / 2) + quad % 2 * 8) =
            make_float2(d[FIRST / 2 + 4 * j + 2 * h], d[FIRST / 2 + 4 * j + 2 * h + 1]);
    staging.publish();
    if (staging.issuer()) {
      if (accumulate)
        tma_reduce_add_3d(&map, buffer, column, at.first_row, at.group);
      else
        tma_store_3d(&map, buffer, column, at.first_row, at.group);
    }
    staging.commit();
    if constexpr (FIRST + 32 < COLUMNS) store<COLUMNS, FIRST + 32>(d, at, staging);
  }
};

}  // namespace ROUTEGRAD_VARIANT
