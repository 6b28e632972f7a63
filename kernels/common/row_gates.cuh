// The gate (routing weight) of each row of a fragment: w_r = gates[t(r), e], t(r) = row_token[r].
#pragma once
#include "gemm_epilogue.cuh"

namespace ROUTEGRAD_VARIANT {

struct RowGates {
  const float* gates;        // [T, E]; null: every gate is 1
  const int32_t* row_token;  // null: t(r) = r
  int experts;

  // w[h] for the thread's row h of the fragment, 0 past its rows. 16 lanes look up the warp's 16 rows.
  DEV void look_up(float (&w)[2], const Fragment& at) const { spread(w, threadIdx.x % 32 < 16 ? of_lane(at) : 0); }

  // The same in two steps, of which the second can be later: the gate of the warp's row that is the lane's number mod 16, and
  // w from those of lanes 0 to 15.
  DEV float of_lane(const Fragment& at) const {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16;
    if (row >= at.rows) return 0;
    if (!gates) return 1;
    const int r = at.first_row + row;
    const int64_t token = row_token ? ld_global_readonly(row_token + r) : r;
    return ld_global_readonly(gates + token * experts + at.group);
  }
  DEV static void spread(float (&w)[2], float gate) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) w[h] = __shfl_sync(~0u, gate, lane / 4 + 8 * h);
  }
};

}  // namespace ROUTEGRAD_VARIANT
