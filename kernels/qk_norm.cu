// qk_norm: RMSNorm of pieces of rows, for queries and keys inside the fused projection (a head each, or all heads
// together). Of a row's piece x of n elements, r = 1 / √(mean(x²) + ε):
//   qk_norm            y = x r ⊙ w;  scales[t, i] = r
//   qk_norm_backward   dx = r (w ⊙ dy − x r² mean(w ⊙ dy ⊙ x))
// The gradient of w is that of column_sums (rows.cu): Σ dy ⊙ x r. Without w (null) pieces are copied, values so.
// x, y, dx, dy: T rows of `pieces` pieces of n = `width` elements, bf16, the rows `pitch` elements apart; w [n] bf16;
// scales (r) [T, pieces] f32. n and pitch multiples of 8. Assigned; what lies between is left alone.
//
// A warp a piece, which it reads twice (the second time from L1 or L2); sums in f32, over the lanes pairwise. Deterministic.
// Bytes: forward 4 an element and 4 a piece, backward 6 and 4. FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s.
#include "common/eight.cuh"
#include "common/warp.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Pieces {
  int64_t rows, pitch;
  int count, width;  // of a row; elements

  // The piece of the warp's, or one past the last.
  DEV int64_t number() const { return int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; }
  DEV bool inside(int64_t piece) const { return piece < rows * count; }
  DEV int64_t start(int64_t piece) const { return piece / count * pitch + piece % count * width; }
  // Calls f(first column of a lane's 8) until the piece is done.
  template <class F>
  DEV void each(F&& f) const {
    for (int column = 8 * static_cast<int>(threadIdx.x % 32); column < width; column += 256) f(column);
  }
};

__global__ void __launch_bounds__(kThreads)
    qk_norm_kernel(bf16* y, float* scales, const bf16* x, const bf16* w, const __grid_constant__ Pieces p, float eps) {
  const int64_t piece = p.number();
  if (!p.inside(piece)) return;
  x += p.start(piece);
  y += p.start(piece);
  if (!w) {
    p.each([&](int column) { store_eight(y + column, load_eight(x + column)); });
    return;
  }
  float squares = 0;
  p.each([&](int column) {
    const Eight v = load_eight(x + column);
#pragma unroll
    for (int k = 0; k < 8; ++k) squares += v.value[k] * v.value[k];
  });
  const float scale = rsqrtf(sum_of_warp(squares) / static_cast<float>(p.width) + eps);
  if (threadIdx.x % 32 == 0) st_global(scales + piece, scale);
  p.each([&](int column) {
    Eight v = load_eight(x + column);
    const Eight weight = load_eight(w + column);
#pragma unroll
    for (int k = 0; k < 8; ++k) v.value[k] *= scale * weight.value[k];
    store_eight(y + column, v);
  });
}

__global__ void __launch_bounds__(kThreads)
    qk_norm_backward_kernel(bf16* dx, const float* scales, const bf16* dy, const bf16* x, const bf16* w,
                            const __grid_constant__ Pieces p) {
  const int64_t piece = p.number();
  if (!p.inside(piece)) return;
  x += p.start(piece);
  dx += p.start(piece);
  dy += p.start(piece);
  if (!w) {
    p.each([&](int column) { store_eight(dx + column, load_eight(dy + column)); });
    return;
  }
  float dot = 0;
  p.each([&](int column) {
    const Eight v = load_eight(x + column), d = load_eight(dy + column), weight = load_eight(w + column);
#pragma unroll
    for (int k = 0; k < 8; ++k) dot += weight.value[k] * d.value[k] * v.value[k];
  });
  const float scale = ld_global_readonly(scales + piece);
  const float mean = scale * scale * sum_of_warp(dot) / static_cast<float>(p.width);
  p.each([&](int column) {
    const Eight v = load_eight(x + column), d = load_eight(dy + column), weight = load_eight(w + column);
    Eight out;
#pragma unroll
    for (int k = 0; k < 8; ++k) out.value[k] = scale * (weight.value[k] * d.value[k] - v.value[k] * mean);
    store_eight(dx + column, out);
  });
}

}  // namespace

#define REQUIRE_PIECES(launcher)                                                                               \
  REQUIRE(launcher, rows, 1 <= rows && rows <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);                             \
  REQUIRE(launcher, pieces, 1 <= pieces && pieces <= 1 << 16, ROUTEGRAD_OUT_OF_RANGE);                         \
  REQUIRE(launcher, width, 1 <= width && width <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);                            \
  REQUIRE_MULTIPLE_OF_8(launcher, width);                                                                      \
  REQUIRE(launcher, pitch, int64_t{pieces} * width <= pitch && pitch <= int64_t{1} << 31, ROUTEGRAD_OUT_OF_RANGE); \
  REQUIRE_MULTIPLE_OF_8(launcher, pitch);                                                                      \
  REQUIRE(launcher, rows, rows * pieces <= int64_t{INT32_MAX} * kWarps, ROUTEGRAD_OVERFLOW);                   \
  const Pieces p { rows, pitch, pieces, width };                                                               \
  const LaunchShape shape { dim3(static_cast<uint32_t>((rows * pieces + kWarps - 1) / kWarps)), kThreads }

routegrad_status qk_norm(void* y, float* scales, const void* x, const void* w, int64_t rows, int32_t pieces,
                         int32_t width, int64_t pitch, float eps, routegrad_stream stream) {
  REQUIRE_POINTER(qk_norm, y);
  if (w) REQUIRE_POINTER(qk_norm, scales);
  REQUIRE_POINTER(qk_norm, x);
  if (w) REQUIRE_POINTER(qk_norm, w);
  REQUIRE_PIECES(qk_norm);
  return launch(qk_norm_kernel, shape, stream, static_cast<bf16*>(y), scales, static_cast<const bf16*>(x),
                static_cast<const bf16*>(w), p, eps);
}

routegrad_status qk_norm_backward(void* dx, const float* scales, const void* dy, const void* x, const void* w,
                                  int64_t rows, int32_t pieces, int32_t width, int64_t pitch, routegrad_stream stream) {
  REQUIRE_POINTER(qk_norm_backward, dx);
  if (w) REQUIRE_POINTER(qk_norm_backward, scales);
  REQUIRE_POINTER(qk_norm_backward, dy);
  REQUIRE_POINTER(qk_norm_backward, x);
  if (w) REQUIRE_POINTER(qk_norm_backward, w);
  REQUIRE_PIECES(qk_norm_backward);
  return launch(qk_norm_backward_kernel, shape, stream, static_cast<bf16*>(dx), scales, static_cast<const bf16*>(dy),
                static_cast<const bf16*>(x), static_cast<const bf16*>(w), p);
}

}  // namespace ROUTEGRAD_VARIANT
