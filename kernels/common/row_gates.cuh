// The gate (routing weight) of each row of a fragment: w_r = gates[t(r), e], t(r) = row_token[r].
#pragma once
#include "gemm_epilogue.cuh"

namespace ROUTEGRAD_VARIANT {

struct RowGates {
  const float* gates;        // [T, E]; null: every gate is 1
  const int32_t* row_token;  // null: t(r) = r
  int experts;

  // w[h] for the thread's row h of the fragment, 0 past its rows. 16 lanes look up the warp's 16 rows.
  DEV void look_up(float (&w)[2], const Fragment& at) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane;
    float gate = 0;
    if (lane < 16 && row < at.rows) {
      const int r = at.first_row + row;
      gate = 1;
      if (gates) {
        const int64_t token = row_token ? ld_global_readonly(row_token + r) : r;
        gate = ld_global_readonly(gates + token * experts + at.group);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) w[h] = __shfl_sync(~0u, gate, lane / 4 + 8 * h);
  }
};

}  // namespace ROUTEGRAD_VARIANT
