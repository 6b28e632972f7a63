// rope: rotary position embedding (arXiv 2104.09864), the rotate-half form, of the fused projection's rows.
//   A row holds H query heads, KV key heads, KV value heads, each d wide. Of a query or key head with halves a, b:
//     y = (a cos − b sin, b cos + a sin), angles position · θ^(−2i/d), i < d/2, position = row mod S
//   Values are copied. With `back` the angles are the opposite: the gradient of x from that of y.
// x, y [T, (H + 2 KV) d] bf16; cosines, sines [S, d/2] f32; d a multiple of 16. Assigned. In place: y may be x.
//
// The angles come as a table that the host formed in float64: a cosine or sine is within 2^-25 of itself at any position.
// (An f32 product of position and frequency may be off by 5e-4 at position 8191.) Products and sums in f32.
// Deterministic: every element has one writer and no sum is longer than two terms.
//
// A thread turns 8 neighbours of each half of a head, so it loads and stores 16 bytes four times. The tables are read once
// a head, from L2 and L1: 4·S·d bytes, 0.5 MB for 2048 positions of width 64.
//
// Bytes: 4·T·(H + 2 KV)·d + 4·S·d. FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s, of 16,384 rows of 3 × 2048 94 µs.
#include "common/eight.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxHeads = 1024, kMaxWidth = 1024;

struct Rope {
  bf16* y;
  const bf16* x;
  const float *cosines, *sines;
  int64_t pairs;           // of 8 elements of one half and the 8 of the other, in all
  uint32_t row_pairs;      // of a row
  uint32_t turned_pairs;   // of its query and key heads, which stand first
  uint32_t half;           // d / 2
  int sequence;
  float direction;         // 1 forward, -1 back
};

// 8 angles' cosines or sines: from L1 after the first head, so the simulator does not count them.
DEV Eight angles(const float* from) {
  return join(__ldg(reinterpret_cast<const float4*>(from)), __ldg(reinterpret_cast<const float4*>(from + 4)));
}

// Grid: a thread a pair, in order.
__global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ Rope p) {
  const int64_t first = int64_t{blockIdx.x} * kThreads;
  if (first + threadIdx.x >= p.pairs) return;
  // One division of 64 bits a block; within it 32 are enough.
  const int64_t first_row = first / p.row_pairs;
  const uint32_t ahead = static_cast<uint32_t>(first - first_row * p.row_pairs) + threadIdx.x;
  const int64_t row = first_row + ahead / p.row_pairs;
  const uint32_t pair = ahead % p.row_pairs, head = pair / (p.half / 8), column = pair % (p.half / 8) * 8;
  const int64_t at = row * p.row_pairs * 16 + head * 2 * p.half + column;
  uint4 a = ld_global(reinterpret_cast<const uint4*>(p.x + at));
  uint4 b = ld_global(reinterpret_cast<const uint4*>(p.x + at + p.half));
  if (pair < p.turned_pairs) {
    const int64_t angle = row % p.sequence * p.half + column;
    const Eight cosine = angles(p.cosines + angle), sine = angles(p.sines + angle), u = unpack(a), v = unpack(b);
    Eight turned_u, turned_v;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float c = cosine.value[i], s = p.direction * sine.value[i];
      turned_u.value[i] = u.value[i] * c - v.value[i] * s;
      turned_v.value[i] = v.value[i] * c + u.value[i] * s;
    }
    a = pack(turned_u);
    b = pack(turned_v);
  }
  st_global(reinterpret_cast<uint4*>(p.y + at), a);
  st_global(reinterpret_cast<uint4*>(p.y + at + p.half), b);
}

}  // namespace

routegrad_status rope(void* y, const void* x, const float* cosines, const float* sines, int64_t tokens, int32_t sequence,
                      int32_t heads, int32_t key_value_heads, int32_t head_width, int32_t back, routegrad_stream stream) {
  REQUIRE_POINTER(rope, y);
  REQUIRE_POINTER(rope, x);
  REQUIRE_POINTER(rope, cosines);
  REQUIRE_POINTER(rope, sines);
  REQUIRE(rope, tokens, 1 <= tokens && tokens <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(rope, sequence, sequence >= 1, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(rope, heads, 1 <= heads && heads <= kMaxHeads, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(rope, key_value_heads, 1 <= key_value_heads && key_value_heads <= heads, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(rope, head_width, 1 <= head_width && head_width <= kMaxWidth && head_width % 16 == 0, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(rope, back, back == 0 || back == 1, ROUTEGRAD_OUT_OF_RANGE);
  const uint32_t half = static_cast<uint32_t>(head_width) / 2, head_pairs = half / 8;
  const uint32_t row_pairs = static_cast<uint32_t>(heads + 2 * key_value_heads) * head_pairs;
  const int64_t pairs = tokens * row_pairs, blocks = (pairs + kThreads - 1) / kThreads;
  REQUIRE(rope, tokens, blocks <= INT32_MAX, ROUTEGRAD_OVERFLOW);
  const Rope p{static_cast<bf16*>(y),
               static_cast<const bf16*>(x),
               cosines,
               sines,
               pairs,
               row_pairs,
               static_cast<uint32_t>(heads + key_value_heads) * head_pairs,
               half,
               sequence,
               back ? -1.0f : 1.0f};
  return launch(rope_kernel, {dim3(static_cast<uint32_t>(blocks)), kThreads}, stream, p);
}

}  // namespace ROUTEGRAD_VARIANT
