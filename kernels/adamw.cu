// adamw: one update of a parameter, the sum of squares of its gradient, and the copy of it that other kernels read.
//   adamw_update   g = scale·gradient;  m = β₁ m + (1 − β₁) g;  v = β₂ v + (1 − β₂) g²;
//                  w = keep·w − rate·m / (√(v·second_scale) + ε)               (Loshchilov and Hutter, 1711.05101)
//   square_sums    parts[b] = Σ gradient² over the b-th 8192 numbers, in f64; square_parts says how many parts there are
//   round_weights  r = w as bf16, to nearest, ties away from zero
// w, m, v, gradient [N] f32; r [N] bf16; parts f64. coefficients [7] f32, on the device so that a graph may be replayed
// at another rate: β₁, β₂, rate = η / (1 − β₁ᵗ), second_scale = 1 / (1 − β₂ᵗ), ε, keep = 1 − ηλ or 1, scale.
// Deterministic: no atomics; the order of each sum is fixed by N.
//
// Bytes: update 28·N, square_sums 4·N, round_weights 6·N. FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s; for the
// 7.33b model 48, 7 and 10 ms.
#include "common/simt.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 8;                        // numbers of a thread, kThreads apart
constexpr int kBlockNumbers = kThreads * kEach;
constexpr int kSquares = 32;                    // the same for square_sums
constexpr int kPartNumbers = kThreads * kSquares;

DEV int64_t place(int i, int each) { return int64_t{blockIdx.x} * kThreads * each + i * kThreads + threadIdx.x; }

__global__ void __launch_bounds__(kThreads)
    adamw_update_kernel(float* w, float* m, float* v, const float* gradient, const float* coefficients, int64_t count) {
  float c[7];
#pragma unroll
  for (int i = 0; i < 7; ++i) c[i] = ld_global_readonly(coefficients + i);
  const float beta1 = c[0], beta2 = c[1], rate = c[2], second_scale = c[3], eps = c[4], keep = c[5], scale = c[6];
  float old[kEach][4];  // all loads before the first store
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = place(i, kEach);
    if (at >= count) continue;
    old[i][0] = ld_global(w + at);
    old[i][1] = ld_global(m + at);
    old[i][2] = ld_global(v + at);
    old[i][3] = ld_global_readonly(gradient + at);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = place(i, kEach);
    if (at >= count) continue;
    const float g = old[i][3] * scale;
    const float first = beta1 * old[i][1] + (1.0f - beta1) * g;
    const float second = beta2 * old[i][2] + (1.0f - beta2) * (g * g);
    st_global(m + at, first);
    st_global(v + at, second);
    st_global(w + at, keep * old[i][0] - rate * first / (sqrtf(second * second_scale) + eps));
  }
}

struct SquaresShared {
  double sum[kThreads];
};

__global__ void __launch_bounds__(kThreads) square_sums_kernel(double* parts, const float* gradient, int64_t count) {
  DYNAMIC_SHARED(SquaresShared, s);
  double sum = 0;
#pragma unroll 8
  for (int i = 0; i < kSquares; ++i) {
    const int64_t at = place(i, kSquares);
    const double g = at < count ? ld_global_readonly(gradient + at) : 0.0f;
    sum += g * g;
  }
  s.sum[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) s.sum[threadIdx.x] += s.sum[threadIdx.x + half];
  }
  if (threadIdx.x == 0) st_global(parts + blockIdx.x, s.sum[0]);
}

__global__ void __launch_bounds__(kThreads) round_weights_kernel(uint16_t* r, const float* w, int64_t count) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = place(i, kEach);
    if (at < count) st_global(r + at, static_cast<uint16_t>((__float_as_uint(ld_global_readonly(w + at)) + 0x8000u) >> 16));
  }
}

uint32_t blocks_of(int64_t count, int size) { return static_cast<uint32_t>((count + size - 1) / size); }

}  // namespace

#define REQUIRE_NUMBERS(launcher) \
  REQUIRE(launcher, numbers, 1 <= numbers && numbers <= int64_t{INT32_MAX} * kBlockNumbers, ROUTEGRAD_OUT_OF_RANGE)

routegrad_status adamw_update(float* w, float* m, float* v, const float* gradient, const float* coefficients,
                              int64_t numbers, routegrad_stream stream) {
  REQUIRE_POINTER(adamw_update, w);
  REQUIRE_POINTER(adamw_update, m);
  REQUIRE_POINTER(adamw_update, v);
  REQUIRE_POINTER(adamw_update, gradient);
  REQUIRE_POINTER(adamw_update, coefficients);
  REQUIRE_NUMBERS(adamw_update);
  return launch(adamw_update_kernel, {dim3(blocks_of(numbers, kBlockNumbers)), kThreads}, stream, w, m, v, gradient,
                coefficients, numbers);
}

routegrad_status square_parts(uint64_t* parts, int64_t numbers) {
  REQUIRE(square_parts, parts, parts != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE_NUMBERS(square_parts);
  *parts = blocks_of(numbers, kPartNumbers);
  return ROUTEGRAD_OK;
}

routegrad_status square_sums(double* parts, const float* gradient, int64_t numbers, routegrad_stream stream) {
  REQUIRE(square_sums, parts, parts != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE_POINTER(square_sums, gradient);
  REQUIRE_NUMBERS(square_sums);
  return launch(square_sums_kernel, {dim3(blocks_of(numbers, kPartNumbers)), kThreads, shared_bytes<SquaresShared>},
                stream, parts, gradient, numbers);
}

routegrad_status round_weights(void* r, const float* w, int64_t numbers, routegrad_stream stream) {
  REQUIRE_POINTER(round_weights, r);
  REQUIRE_POINTER(round_weights, w);
  REQUIRE_NUMBERS(round_weights);
  return launch(round_weights_kernel, {dim3(blocks_of(numbers, kBlockNumbers)), kThreads}, stream,
                static_cast<uint16_t*>(r), w, numbers);
}

}  // namespace ROUTEGRAD_VARIANT
