// Rotary position embedding of heads that lie in accumulator fragments: d[4 j + 2 h + e] of a thread belongs to row h and
// column 8 j + 2 (lane % 4) + e, so that both elements of a pair, D/2 columns apart, are the same thread's.
#pragma once
#include "ptx.cuh"

namespace ROUTEGRAD_VARIANT {

// [S, D/2] f32 each, as rope.cu has them.
struct RopeTables {
  const float *cosines, *sines;
};

constexpr int kMaxPositions = 1 << 24;  // so that a table's elements are counted in 32 bits

// Turns the first `heads` heads of width D in d as at position[h], back where direction is -1.
template <int D, int R>
DEV void turn_heads(float (&d)[R], const RopeTables& tables, const int (&position)[2], int heads, float direction) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = position[h] * (D / 2) + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      // From L1 after the first head, so the simulator does not count them.
      const auto c = __ldg(reinterpret_cast<const float2*>(tables.cosines + row + 8 * j));
      const auto s = __ldg(reinterpret_cast<const float2*>(tables.sines + row + 8 * j));
      const float cosine[2] = {c.x, c.y}, sine[2] = {direction * s.x, direction * s.y};
#pragma unroll
      for (int head = 0; head < 2 * R / D; ++head) {
        if (head >= heads) continue;
        float* const of_head = d + head * (D / 2) + 4 * j + 2 * h;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float a = of_head[e], b = of_head[D / 4 + e];
          of_head[e] = a * cosine[e] - b * sine[e];
          of_head[D / 4 + e] = b * cosine[e] + a * sine[e];
        }
      }
    }
  }
}

}  // namespace ROUTEGRAD_VARIANT
