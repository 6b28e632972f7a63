// Sums and maxima over the lanes of a warp, pairwise, so the same on every lane and under every schedule.
#pragma once
#include "simt.cuh"

namespace ROUTEGRAD_VARIANT {

template <class T>
DEV T sum_of_warp(T sum) {
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return sum;
}
// Over a quad: the four lanes that hold a row of an accumulator fragment.
DEV float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}
DEV float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
// Over the eight quads of a warp, lane by lane of a quad.
DEV float sum_of_quads(float v) {
  v += __shfl_xor_sync(~0u, v, 4);
  v += __shfl_xor_sync(~0u, v, 8);
  return v + __shfl_xor_sync(~0u, v, 16);
}

}  // namespace ROUTEGRAD_VARIANT
