// step: what stands around the update of an optimizer step, so that the host need not wait for any of it.
//   losses_add     sums += (or =) share · (cross-entropy, auxiliary, z) of one micro-batch
//   step_decide    ‖gradient‖ = √(Σ parts); the step is accepted when no layer raised a flag and loss and norm are finite;
//                  then updates += 1 and the optimizer's coefficients are those of that update:
//                    rate / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ), keep = 1 − rate·decay where a parameter decays, else 1, and
//                    scale = min(1, clip / ‖gradient‖) (clip 0: 1)
//   state_commit   whatever a step may change beside weights and moments: accepted, committed = pending; else the reverse
// sums [3] f64; auxiliary, z may be null. flags [layers, 2] int32: the first token of the layer whose logits were not finite
// (none: INT32_MAX), and the dispatch's fault bits. parts [P] f64 of square_sums. settings and outcome lie in device memory;
// the host writes settings before a step and reads outcome after it. Deterministic: sums in a fixed order.
// Bytes: 8·P + 8·layers; the state's bytes twice. FLOPs: none. One block decides: about 0.1 ms for the 7.33b model.
#include "common/simt.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256;

__global__ void losses_add_kernel(double* sums, const float* cross_entropy, const float* auxiliary, const float* z,
                                  double share, bool first) {
  const float* term[3] = {cross_entropy, auxiliary, z};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const double add = term[i] ? share * ld_global_readonly(term[i]) : 0.0;
    st_global(sums + i, first ? add : ld_global(sums + i) + add);
  }
}

DEV bool finite(double x) { return x - x == 0; }

struct DecideShared {
  double sum[kThreads];
};

__global__ void __launch_bounds__(kThreads)
    step_decide_kernel(routegrad_step_outcome* outcome, const routegrad_step_settings* settings, const double* losses,
                       const int32_t* flags, const double* parts, int64_t count, int layers) {
  DYNAMIC_SHARED(DecideShared, s);
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += ld_global_readonly(parts + i);
  s.sum[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) s.sum[threadIdx.x] += s.sum[threadIdx.x + half];
  }
  if (threadIdx.x > 0) return;
  routegrad_step_outcome o = *outcome;
  const routegrad_step_settings c = *settings;
  o.norm = sqrt(s.sum[0]);
  o.layer = -1;
  o.token = o.fault = 0;
  for (int i = 0; i < 3; ++i) o.losses[i] = ld_global_readonly(losses + i);
  for (int layer = 0; layer < layers; ++layer) {
    const int32_t token = ld_global_readonly(flags + 2 * layer), fault = ld_global_readonly(flags + 2 * layer + 1);
    if (o.layer < 0 && (token != INT32_MAX || fault)) o.layer = layer, o.token = token, o.fault = fault;
  }
  o.accepted = o.layer < 0 && finite(o.losses[0]) && finite(o.norm);
  if (o.accepted) {
    o.updates += 1;
    const double t = static_cast<double>(o.updates);
    for (int decays = 0; decays < 2; ++decays) {
      float* to = o.coefficients[decays];
      to[0] = static_cast<float>(c.beta1);
      to[1] = static_cast<float>(c.beta2);
      to[2] = static_cast<float>(c.rate / (1 - pow(c.beta1, t)));
      to[3] = static_cast<float>(1 / (1 - pow(c.beta2, t)));
      to[4] = static_cast<float>(c.eps);
      to[5] = static_cast<float>(decays ? 1 - c.rate * c.weight_decay : 1.0);
      to[6] = static_cast<float>(c.clip > 0 && o.norm > c.clip ? c.clip / o.norm : 1.0);
    }
  }
  *outcome = o;
}

// Block (b, i) copies a piece of tensor i.
__global__ void __launch_bounds__(kThreads)
    state_commit_kernel(const routegrad_state* states, const routegrad_step_outcome* outcome) {
  const routegrad_state state = states[blockIdx.y];
  const bool accepted = ld_global_readonly(&outcome->accepted) != 0;
  const uint32_t* from = accepted ? state.pending : state.committed;
  uint32_t* to = accepted ? state.committed : state.pending;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < state.words; at += int64_t{gridDim.x} * kThreads)
    st_global(to + at, ld_global(from + at));
}

}  // namespace

routegrad_status losses_add(double* sums, const float* cross_entropy, const float* auxiliary, const float* z, double share,
                            int32_t first, routegrad_stream stream) {
  REQUIRE_POINTER(losses_add, sums);
  REQUIRE(losses_add, cross_entropy, cross_entropy != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE(losses_add, first, first == 0 || first == 1, ROUTEGRAD_OUT_OF_RANGE);
  return launch(losses_add_kernel, {dim3(1), 1}, stream, sums, cross_entropy, auxiliary, z, share, first != 0);
}

routegrad_status step_decide(routegrad_step_outcome* outcome, const routegrad_step_settings* settings, const double* losses,
                             const int32_t* flags, const double* parts, int64_t count, int32_t layers,
                             routegrad_stream stream) {
  REQUIRE_POINTER(step_decide, outcome);
  REQUIRE_POINTER(step_decide, settings);
  REQUIRE_POINTER(step_decide, losses);
  REQUIRE_POINTER(step_decide, parts);
  REQUIRE(step_decide, count, 1 <= count && count <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(step_decide, layers, 0 <= layers && layers <= 4096, ROUTEGRAD_OUT_OF_RANGE);
  if (layers) REQUIRE_POINTER(step_decide, flags);
  return launch(step_decide_kernel, {dim3(1), kThreads, shared_bytes<DecideShared>}, stream, outcome, settings, losses, flags,
                parts, count, layers);
}

routegrad_status state_commit(const routegrad_state* states, const routegrad_step_outcome* outcome, int32_t count,
                              int64_t most_words, routegrad_stream stream) {
  REQUIRE_POINTER(state_commit, states);
  REQUIRE_POINTER(state_commit, outcome);
  REQUIRE(state_commit, count, 1 <= count && count <= 65535, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(state_commit, most_words, 1 <= most_words && most_words <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  const auto blocks = static_cast<uint32_t>((most_words + 8 * kThreads - 1) / (8 * kThreads));
  return launch(state_commit_kernel, {dim3(blocks < 64 ? blocks : 64, static_cast<uint32_t>(count)), kThreads}, stream,
                states, outcome);
}

}  // namespace ROUTEGRAD_VARIANT
