// An f32 as a sum of bf16 terms, for tensor cores, which multiply bf16: v = t0 + t1 + …, each term the bf16 nearest to what
// the earlier ones leave. Two terms hold 16 bits of v, three hold all 24 (while t2 is normal, |v| > 2^-100 or so).
#pragma once
#include "ptx_copy.cuh"

namespace ROUTEGRAD_VARIANT {

// The next term of two values: rounds them to a packed pair and leaves what is missing.
DEV uint32_t take_term(float& low, float& high) {
  const uint32_t pair = pack_bf16(low, high);
  low -= low_bf16(pair);
  high -= high_bf16(pair);
  return pair;
}
// Two terms: high + low.
DEV void split(uint32_t& high, uint32_t& low, float a, float b) {
  high = pack_bf16(a, b);
  low = pack_bf16(a - low_bf16(high), b - high_bf16(high));
}

}  // namespace ROUTEGRAD_VARIANT
