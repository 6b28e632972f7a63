// adamw: one update of all parameters, and the sums of squares of their gradients.
//   adamw_update   g = scale·gradient;  m = β₁ m + (1 − β₁) g;  v = β₂ v + (1 − β₂) g²;
//                  w = keep·w − rate·m / (√(v·second_scale) + ε)               (Loshchilov and Hutter, 1711.05101)
//   square_sums    parts[b] = Σ gradient² over the numbers of block b, in f64
// Both take a table of parameters (routegrad_parameter) whose numbers are cut into blocks of 8192: block_parameter[b] is the
// parameter that block b works on, the first of a parameter's blocks stands in its row. A parameter without a gradient counts
// as one whose gradient is 0.
//
// A value w is whole, in f32, or split: upper, w as bf16 to nearest with ties away from zero, which is what other kernels
// read, and lower, an int16 with bits(w) = (upper << 16) + lower modulo 2^32. That is exact for every bit pattern.
// Moments are f32, or bf16 rounded stochastically: the bits of x plus a random number below 2^16, cut to the upper 16. The
// mean of what is stored is x, so that small changes are not lost. The draws are those of src/tensor/random.rs with seed 0, purpose
// 6, step = the number of the update, layer = the parameter: for number n of it word (n / 256) % 4 of index
// (n / 1024) 256 + n % 256, lower half for m, upper half for v.
// The coefficients of decaying and other parameters come from `outcome` (step.cu), on the device, so that a graph may be
// replayed at another rate; where it says that the step is refused, nothing is written.
// Deterministic: no atomics; the order of each sum is fixed by the table.
//
// Bytes: update 28·N, with bf16 moments 20·N; square_sums 4·N. FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s; for the
// 7.33b model 48, 34 and 7 ms.
#include "common/philox.cuh"
#include "common/simt.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 8;                              // numbers of a thread at a time, kThreads apart
constexpr int kBlockNumbers = 8192;
constexpr int kRound = kThreads * kEach;
constexpr uint32_t kRoundingPurpose = 6;              // Purpose::Rounding of src/tensor/random.rs

struct Place {
  routegrad_parameter parameter;
  int64_t first;  // of the block's numbers
  uint32_t number;  // of the parameter
};

DEV Place place(const routegrad_parameter* parameters, const int32_t* block_parameter) {
  const int32_t number = ld_global_readonly(block_parameter + blockIdx.x);
  Place p{parameters[number], 0, static_cast<uint32_t>(number)};
  p.first = (int64_t{blockIdx.x} - p.parameter.first_block) * kBlockNumbers;
  return p;
}

DEV float ld_value(const routegrad_parameter& p, int64_t at) {
  if (p.whole) return ld_global(p.whole + at);
  const uint32_t upper = ld_global(p.upper + at);
  return __uint_as_float((upper << 16) + static_cast<uint32_t>(static_cast<int32_t>(ld_global(p.lower + at))));
}

DEV void st_value(const routegrad_parameter& p, int64_t at, float w) {
  if (p.whole) return st_global(p.whole + at, w);
  const uint32_t bits = __float_as_uint(w), upper = (bits + 0x8000u) >> 16;
  st_global(p.upper + at, static_cast<uint16_t>(upper));
  st_global(p.lower + at, static_cast<int16_t>(bits - (upper << 16)));
}

DEV float ld_moment(const float* from) { return ld_global(from); }
DEV float ld_moment(const uint16_t* from) { return __uint_as_float(uint32_t{ld_global(from)} << 16); }
DEV void st_moment(float* to, float x, uint32_t) { st_global(to, x); }
DEV void st_moment(uint16_t* to, float x, uint32_t random) {
  st_global(to, static_cast<uint16_t>((__float_as_uint(x) + random) >> 16));
}

template <class Moment>
DEV void update(const Place& block, const routegrad_step_outcome* outcome) {
  const routegrad_parameter& p = block.parameter;
  Moment *m = static_cast<Moment*>(p.first), *v = static_cast<Moment*>(p.second);
  const float* coefficients = outcome->coefficients[p.decays ? 1 : 0];
  float c[7];
#pragma unroll
  for (int i = 0; i < 7; ++i) c[i] = ld_global_readonly(coefficients + i);
  const float beta1 = c[0], beta2 = c[1], rate = c[2], second_scale = c[3], eps = c[4], keep = c[5], scale = c[6];
  const Philox random{{0, 0}, static_cast<uint32_t>(ld_global_readonly(&outcome->updates)), kRoundingPurpose << 24 | block.number};
  for (int64_t from = block.first; from < block.first + kBlockNumbers && from < p.elements; from += kRound) {
    float old[kEach][4];  // all loads before the first store
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t at = from + i * kThreads + threadIdx.x;
      if (at >= p.elements) continue;
      old[i][0] = ld_value(p, at);
      old[i][1] = ld_moment(m + at);
      old[i][2] = ld_moment(v + at);
      old[i][3] = p.gradient ? ld_global_readonly(p.gradient + at) : 0.0f;
    }
#pragma unroll
    for (int four = 0; four < kEach; four += 4) {
      Philox::Words words{};
      if constexpr (sizeof(Moment) == 2) words = random.words((from / 1024 + four / 4) * kThreads + threadIdx.x);
#pragma unroll
      for (int i = four; i < four + 4; ++i) {
        const int64_t at = from + i * kThreads + threadIdx.x;
        if (at >= p.elements) continue;
        const float g = old[i][3] * scale;
        const float first = beta1 * old[i][1] + (1.0f - beta1) * g;
        const float second = beta2 * old[i][2] + (1.0f - beta2) * (g * g);
        st_moment(m + at, first, words.at[i % 4] & 0xffff);
        st_moment(v + at, second, words.at[i % 4] >> 16);
        st_value(p, at, keep * old[i][0] - rate * first / (sqrtf(second * second_scale) + eps));
      }
    }
  }
}

template <class Moment>
__global__ void __launch_bounds__(kThreads, 4)
    adamw_update_kernel(const routegrad_parameter* parameters, const int32_t* block_parameter,
                        const routegrad_step_outcome* outcome) {
  if (!ld_global_readonly(&outcome->accepted)) return;
  update<Moment>(place(parameters, block_parameter), outcome);
}

struct SquaresShared {
  double sum[kThreads];
};

__global__ void __launch_bounds__(kThreads)
    square_sums_kernel(double* parts, const routegrad_parameter* parameters, const int32_t* block_parameter) {
  DYNAMIC_SHARED(SquaresShared, s);
  const Place block = place(parameters, block_parameter);
  const routegrad_parameter& p = block.parameter;
  double sum = 0;
#pragma unroll 8
  for (int i = 0; i < kBlockNumbers / kThreads; ++i) {
    const int64_t at = block.first + i * kThreads + threadIdx.x;
    const double g = p.gradient && at < p.elements ? ld_global_readonly(p.gradient + at) : 0.0f;
    sum += g * g;
  }
  s.sum[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) s.sum[threadIdx.x] += s.sum[threadIdx.x + half];
  }
  if (threadIdx.x == 0) st_global(parts + blockIdx.x, s.sum[0]);
}

}  // namespace

#define REQUIRE_BLOCKS(launcher) \
  REQUIRE(launcher, blocks, 1 <= blocks && blocks <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE)

routegrad_status adamw_update(const routegrad_parameter* parameters, const int32_t* block_parameter,
                              const routegrad_step_outcome* outcome, int64_t blocks, int32_t bf16_moments,
                              routegrad_stream stream) {
  REQUIRE_POINTER(adamw_update, parameters);
  REQUIRE_POINTER(adamw_update, block_parameter);
  REQUIRE_POINTER(adamw_update, outcome);
  REQUIRE_BLOCKS(adamw_update);
  REQUIRE(adamw_update, bf16_moments, bf16_moments == 0 || bf16_moments == 1, ROUTEGRAD_OUT_OF_RANGE);
  const auto kernel = bf16_moments ? adamw_update_kernel<uint16_t> : adamw_update_kernel<float>;
  return launch(kernel, {dim3(static_cast<uint32_t>(blocks)), kThreads}, stream, parameters, block_parameter, outcome);
}

routegrad_status square_sums(double* parts, const routegrad_parameter* parameters, const int32_t* block_parameter,
                             int64_t blocks, routegrad_stream stream) {
  REQUIRE_POINTER(square_sums, parts);
  REQUIRE_POINTER(square_sums, parameters);
  REQUIRE_POINTER(square_sums, block_parameter);
  REQUIRE_BLOCKS(square_sums);
  return launch(square_sums_kernel, {dim3(static_cast<uint32_t>(blocks)), kThreads, shared_bytes<SquaresShared>}, stream,
                parts, parameters, block_parameter);
}

}  // namespace ROUTEGRAD_VARIANT
