// gates: what routers make of a token's scores beside the plain softmax, and its gradient. Of a token t with the chosen
// experts A:
//   selected_gates             w[i] = p[i] / S on A, 0 off it, S = Σ_A p with `renormalize`, else 1
//   selected_gates_backward    dp[i] = (dw[i] − Σ_A w dw) / S on A (without `renormalize` dw[i]); off A dw[i] / S with
//                              `through`, else 0. Renormalised TopK and ReLU's positive part; through: DenseMixer
//   sampled_gates              w[i] = Σ_r [i = a_r] h_r q^r_i, q^r the softmax of z over the experts that stage r keeps
//   sampled_gates_backward     dz[j] = c Σ_r dw[a_r] q^r_{a_r} ([j = a_r] − q^r_j): SparseMixer's estimator, h left out
// p, w, z and their gradients [T, E] f32, assigned. A: common/slots.cuh. Stages r < R <= 2 as router_sample left them:
// experts_chosen (a) [R, T] int32, factors (h) [R, T] f32, kept [R, T, E] int32. c = `estimator`.
// 1 <= E <= 256. A stage that keeps no expert has q = 0.
//
// A warp a token, expert i on lane i mod 32; sums over the lanes pairwise, so the same for any schedule. Arithmetic in f32.
// Bytes: selected 8·T·E (backward 12·T·E) and 8 a slot; sampled 8·T·E + 4·R·T·(E + 2) (backward 12·T·E and the same).
// FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s; of 16,384 tokens and 32 experts one to two µs, that of a launch.
#include "common/slots.cuh"
#include "common/warp.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMaxExperts = 256, kPerLane = kMaxExperts / 32;

// A lane's part of a row: expert lane + 32 i in place i.
struct Row {
  float value[kPerLane];
  DEV float& operator[](int i) { return value[i]; }
};
DEV int expert_of(int i) { return static_cast<int>(threadIdx.x % 32) + 32 * i; }
DEV Row load(const float* row, int experts) {
  Row r;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) r[i] = expert_of(i) < experts ? ld_global_readonly(row + expert_of(i)) : 0;
  return r;
}
DEV void store(float* row, Row& r, int experts) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (expert_of(i) < experts) st_global(row + expert_of(i), r[i]);
}
DEV int64_t token_of_warp() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; }

// Bit i: the token chose expert lane + 32 i.
DEV uint32_t chosen_of_lane(const TokenSlots& slots, int64_t token) {
  uint32_t bits = 0;
  if (!slots.choices) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (expert_of(i) < slots.experts && slots.row(token, expert_of(i)) >= 0) bits |= 1u << i;
    return bits;
  }
  for (int first = 0; first < slots.width; first += 32) {
    const int slot = first + static_cast<int>(threadIdx.x % 32);
    const bool has = slot < slots.width && slots.row(token, slot) >= 0;
    const int expert = has ? slots.expert(token, slot) : -1;
    for (int from = 0; from < 32 && first + from < slots.width; ++from) {
      const int e = __shfl_sync(~0u, expert, from);
      if (e >= 0 && e % 32 == static_cast<int>(threadIdx.x % 32)) bits |= 1u << e / 32;
    }
  }
  return bits;
}

// Σ of a row over the lane's chosen experts.
DEV float sum_chosen(Row& r, uint32_t chosen) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += chosen >> i & 1 ? r[i] : 0;
  return sum_of_warp(sum);
}

__global__ void __launch_bounds__(kThreads)
    selected_gates_kernel(float* w, const float* p, const __grid_constant__ TokenSlots slots, int64_t tokens,
                          bool renormalize) {
  const int64_t token = token_of_warp();
  if (token >= tokens) return;
  const uint32_t chosen = chosen_of_lane(slots, token);
  Row row = load(p + token * slots.experts, slots.experts);
  const float divisor = renormalize ? sum_chosen(row, chosen) : 1;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) row[i] = chosen >> i & 1 ? row[i] / divisor : 0;
  store(w + token * slots.experts, row, slots.experts);
}

__global__ void __launch_bounds__(kThreads)
    selected_gates_backward_kernel(float* dp, const float* dw, const float* p, const __grid_constant__ TokenSlots slots,
                                   int64_t tokens, bool renormalize, bool through) {
  const int64_t token = token_of_warp(), at = token * slots.experts;
  if (token >= tokens) return;
  const uint32_t chosen = chosen_of_lane(slots, token);
  Row d = load(dw + at, slots.experts);
  float divisor = 1, mean = 0;
  if (renormalize) {
    Row row = load(p + at, slots.experts);
    divisor = sum_chosen(row, chosen);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row[i] *= d[i];
    mean = sum_chosen(row, chosen) / divisor;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    d[i] = chosen >> i & 1 ? (d[i] - mean) / divisor : through ? d[i] / divisor : 0;
  store(dp + at, d, slots.experts);
}

struct Stages {
  const float* logits;            // [T, E]
  const int32_t* experts_chosen;  // [R, T]
  const int32_t* kept;            // [R, T, E]
  int64_t tokens;
  int experts, count;

  DEV int chosen(int stage, int64_t token) const { return ld_global_readonly(experts_chosen + stage * tokens + token); }
  // q of a stage.
  DEV Row probabilities(Row z, int stage, int64_t token) const {
    const int32_t* const keep = kept + (stage * tokens + token) * experts;
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool keeps = expert_of(i) < experts && ld_global_readonly(keep + expert_of(i)) != 0;
      if (!keeps) z[i] = -INFINITY;
      largest = fmaxf(largest, z[i]);
    }
    for (int distance = 16; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    if (largest == -INFINITY) largest = 0;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum += z[i] = expf(z[i] - largest);
    sum = sum_of_warp(sum);
    const float factor = sum == 0 ? 0 : 1 / sum;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) z[i] *= factor;
    return z;
  }
};

__global__ void __launch_bounds__(kThreads)
    sampled_gates_kernel(float* w, const float* factors, const __grid_constant__ Stages stages) {
  const int64_t token = token_of_warp(), at = token * stages.experts;
  if (token >= stages.tokens) return;
  const Row z = load(stages.logits + at, stages.experts);
  Row gates{};
  for (int stage = 0; stage < stages.count; ++stage) {
    Row q = stages.probabilities(z, stage, token);
    const float factor = ld_global_readonly(factors + stage * stages.tokens + token);
    const int expert = stages.chosen(stage, token);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (expert_of(i) == expert) gates[i] += factor * q[i];
  }
  store(w + at, gates, stages.experts);
}

__global__ void __launch_bounds__(kThreads)
    sampled_gates_backward_kernel(float* dz, const float* dw, const __grid_constant__ Stages stages, float estimator) {
  const int64_t token = token_of_warp(), at = token * stages.experts;
  if (token >= stages.tokens) return;
  const Row z = load(stages.logits + at, stages.experts);
  Row d{};
  for (int stage = 0; stage < stages.count; ++stage) {
    Row q = stages.probabilities(z, stage, token);
    const int expert = stages.chosen(stage, token);
    float own = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) own += expert_of(i) == expert ? q[i] : 0;
    const float scale = estimator * ld_global_readonly(dw + at + expert) * sum_of_warp(own);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) d[i] += scale * (static_cast<float>(expert_of(i) == expert) - q[i]);
  }
  store(dz + at, d, stages.experts);
}

dim3 blocks(int64_t tokens) { return dim3(static_cast<uint32_t>((tokens + kWarps - 1) / kWarps)); }

}  // namespace

#define REQUIRE_GATES(launcher)                                                             \
  REQUIRE(launcher, tokens, 1 <= tokens && tokens <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);    \
  REQUIRE(launcher, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE)
#define REQUIRE_SELECTED_GATES(launcher)                                                                \
  REQUIRE_POINTER(launcher, slot_row);                                                                  \
  if (choices) REQUIRE_POINTER(launcher, choices);                                                      \
  REQUIRE_GATES(launcher);                                                                              \
  REQUIRE(launcher, rows, 1 <= rows && rows <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);                      \
  REQUIRE(launcher, slots, 1 <= slots && slots <= experts && (choices || slots == experts),             \
          ROUTEGRAD_OUT_OF_RANGE);                                                                      \
  REQUIRE(launcher, renormalize, renormalize == 0 || renormalize == 1, ROUTEGRAD_OUT_OF_RANGE);         \
  const TokenSlots chosen { slot_row, choices, slots, experts, static_cast<uint32_t>(rows) }
#define REQUIRE_SAMPLED_GATES(launcher)                                                     \
  REQUIRE_POINTER(launcher, logits);                                                        \
  REQUIRE_POINTER(launcher, experts_chosen);                                                \
  REQUIRE_POINTER(launcher, kept);                                                          \
  REQUIRE_GATES(launcher);                                                                  \
  REQUIRE(launcher, stages, 1 <= stages && stages <= 2, ROUTEGRAD_OUT_OF_RANGE);            \
  const Stages sampled { logits, experts_chosen, kept, tokens, experts, stages }

routegrad_status selected_gates(float* w, const float* p, const int32_t* slot_row, const int32_t* choices,
                                int64_t tokens, int64_t rows, int32_t experts, int32_t slots, int32_t renormalize,
                                routegrad_stream stream) {
  REQUIRE_POINTER(selected_gates, w);
  REQUIRE_POINTER(selected_gates, p);
  REQUIRE_SELECTED_GATES(selected_gates);
  return launch(selected_gates_kernel, {blocks(tokens), kThreads}, stream, w, p, chosen, tokens, renormalize != 0);
}

routegrad_status selected_gates_backward(float* dp, const float* dw, const float* p, const int32_t* slot_row,
                                         const int32_t* choices, int64_t tokens, int64_t rows, int32_t experts,
                                         int32_t slots, int32_t renormalize, int32_t through, routegrad_stream stream) {
  REQUIRE_POINTER(selected_gates_backward, dp);
  REQUIRE_POINTER(selected_gates_backward, dw);
  REQUIRE_POINTER(selected_gates_backward, p);
  REQUIRE_SELECTED_GATES(selected_gates_backward);
  REQUIRE(selected_gates_backward, through, through == 0 || through == 1, ROUTEGRAD_OUT_OF_RANGE);
  return launch(selected_gates_backward_kernel, {blocks(tokens), kThreads}, stream, dp, dw, p, chosen, tokens,
                renormalize != 0, through != 0);
}

routegrad_status sampled_gates(float* w, const float* factors, const float* logits, const int32_t* experts_chosen,
                               const int32_t* kept, int64_t tokens, int32_t experts, int32_t stages,
                               routegrad_stream stream) {
  REQUIRE_POINTER(sampled_gates, w);
  REQUIRE_POINTER(sampled_gates, factors);
  REQUIRE_SAMPLED_GATES(sampled_gates);
  return launch(sampled_gates_kernel, {blocks(tokens), kThreads}, stream, w, factors, sampled);
}

routegrad_status sampled_gates_backward(float* dz, const float* dw, const float* logits, const int32_t* experts_chosen,
                                        const int32_t* kept, int64_t tokens, int32_t experts, int32_t stages,
                                        float estimator, routegrad_stream stream) {
  REQUIRE_POINTER(sampled_gates_backward, dz);
  REQUIRE_POINTER(sampled_gates_backward, dw);
  REQUIRE_SAMPLED_GATES(sampled_gates_backward);
  return launch(sampled_gates_backward_kernel, {blocks(tokens), kThreads}, stream, dz, dw, sampled, estimator);
}

}  // namespace ROUTEGRAD_VARIANT
