// router_sample: SparseMixer's choice of experts (arXiv 2310.00811, 2409.12136): one a stage, sampled among the likely.
// For a token with logits z [E], stage r = 0 … S - 1, X the expert of the stage before (none in the first):
//   likeliest   argmax of z outside X
//   kept        those outside X with (top - z_i) / max(|z_i|, top) <= 2 ε, top = z of the likeliest (0 / 0 is kept)
//   expert      argmax over the kept of z_i - ln ξ_i, ξ_i exponential: a draw from softmax over the kept
//   factor      1 where the expert is the likeliest or u > threshold, u uniform; else `untrusted`
// Ties go to the lower expert; NaN is below everything, so every choice is an expert (router_forward flags such rows).
//
// The draws are those of src/tensor/random.rs (Philox4x32-10), word 0 of index ((first_token + t) S + r) (E + 1) + i: i < E is
// ξ_i = -ln v, v = (word / 2^9 + 1/2) / 2^23; i = E is u = (word / 2^8) / 2^24. So a token's draws depend on its place in
// the global batch alone, and recomputing a layer finds them again. Logits f32, all else in f64, as on the CPU: the
// choices are the same but where two values lie within a rounding of ln.
//
// Assigned: experts [S, T] int32; factors [S, T] f32; kept [S, T, E] int32, 0 or 1; choices [T, S] int32, ascending. Read:
// logits [T, E] and, since a captured step is replayed, `draws` [1] from device memory; null: the likeliest, factor 1.
// 1 <= S <= 2, S <= E <= 256. A warp a token; nothing depends on the order of threads.
// Bytes: 4·T·E read (and the draws, 24 a lane, from L1), 4·T·S·(E + 3) written. FLOPs: none on tensor cores. Floor: bytes /
// 4.3e12 s; two logarithms in f64 an expert and stage cost about as much.
#include "common/philox.cuh"
#include "common/ptx.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxExperts = 256, kPerLane = kMaxExperts / 32;
constexpr uint32_t kRoutingPurpose = 2;  // Purpose::Routing of src/tensor/random.rs

DEV uint32_t word(const Philox& random, uint64_t index) { return random.words(index).at[0]; }
DEV double exponential(const Philox& random, uint64_t index) {
  return -log(((word(random, index) >> 9) + 0.5) * (1.0 / (1 << 23)));
}
DEV double uniform(const Philox& random, uint64_t index) { return (word(random, index) >> 8) * (1.0 / (1 << 24)); }

struct Sampling {
  int32_t* experts_chosen;
  float* factors;
  int32_t *kept, *choices;
  const float* logits;
  const routegrad_draws* draws;
  int64_t tokens;
  int experts, stages;
  uint32_t layer;
  double distance, threshold;  // 2 ε
  float untrusted;
};

// An expert by some value: the larger first, NaN last, the lower expert among equals.
struct Ranked {
  double value;
  int expert;
  DEV bool before(const Ranked& other) const {
    const bool nan = value != value, other_nan = other.value != other.value;
    if (nan != other_nan) return other_nan;
    return value > other.value || ((nan || value == other.value) && expert < other.expert);
  }
};
DEV Ranked first_of_warp(Ranked best) {
  for (int lane = 1; lane < 32; lane <<= 1) {
    const Ranked other{__shfl_xor_sync(~0u, best.value, lane), __shfl_xor_sync(~0u, best.expert, lane)};
    if (other.before(best)) best = other;
  }
  return best;
}

__global__ void __launch_bounds__(32 * kWarps) router_sample_kernel(const Sampling s) {
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= s.tokens) return;
  double z[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    z[i] = lane + 32 * i < s.experts ? ld_global_readonly(s.logits + token * s.experts + lane + 32 * i) : 0;
  Philox random{};
  uint64_t first_token = 0;
  if (s.draws) {
    const uint64_t seed = ld_global_readonly(&s.draws->seed);
    const auto step = static_cast<uint32_t>(ld_global_readonly(&s.draws->step));
    random = {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}, step, kRoutingPurpose << 24 | s.layer};
    first_token = ld_global_readonly(&s.draws->first_token);
  }
  int excluded = -1;
  for (int stage = 0; stage < s.stages; ++stage) {
    const uint64_t first_draw = ((first_token + token) * s.stages + stage) * (s.experts + 1);
    const double nan = NAN;
    Ranked likeliest{nan, INT32_MAX};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const Ranked candidate{z[i], lane + 32 * i};
      if (candidate.expert < s.experts && candidate.expert != excluded && candidate.before(likeliest)) likeliest = candidate;
    }
    likeliest = first_of_warp(likeliest);
    Ranked sampled{nan, INT32_MAX};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = lane + 32 * i;
      if (expert >= s.experts) continue;
      // Not `<=`: 0 / 0 keeps the expert.
      const bool dropped = (likeliest.value - z[i]) / fmax(fabs(z[i]), likeliest.value) > s.distance;
      const bool keep = expert != excluded && !dropped;
      st_global(s.kept + (stage * s.tokens + token) * s.experts + expert, static_cast<int32_t>(keep));
      if (!keep || !s.draws) continue;
      const Ranked candidate{z[i] - log(exponential(random, first_draw + expert)), expert};
      if (candidate.before(sampled)) sampled = candidate;
    }
    if (s.draws) sampled = first_of_warp(sampled);
    const int expert = s.draws ? sampled.expert : likeliest.expert;
    if (lane == 0) {
      const bool trusted = expert == likeliest.expert || uniform(random, first_draw + s.experts) > s.threshold;
      st_global(s.experts_chosen + stage * s.tokens + token, expert);
      st_global(s.factors + stage * s.tokens + token, trusted ? 1.0f : s.untrusted);
      if (stage == 1) {
        st_global(s.choices + token * 2, min(excluded, expert));
        st_global(s.choices + token * 2 + 1, max(excluded, expert));
      } else if (s.stages == 1) {
        st_global(s.choices + token, expert);
      }
    }
    excluded = expert;
  }
}

}  // namespace

routegrad_status router_sample(int32_t* experts_chosen, float* factors, int32_t* kept, int32_t* choices,
                               const float* logits, const routegrad_draws* draws, int64_t tokens, int32_t experts,
                               int32_t stages, int32_t layer, double epsilon, double threshold, float untrusted,
                               routegrad_stream stream) {
  REQUIRE_POINTER(router_sample, experts_chosen);
  REQUIRE_POINTER(router_sample, factors);
  REQUIRE_POINTER(router_sample, kept);
  REQUIRE_POINTER(router_sample, choices);
  REQUIRE_POINTER(router_sample, logits);
  REQUIRE(router_sample, tokens, 1 <= tokens && tokens <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(router_sample, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(router_sample, stages, 1 <= stages && stages <= 2 && stages <= experts, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(router_sample, layer, 0 <= layer && layer < 1 << 24, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(router_sample, epsilon, epsilon >= 0, ROUTEGRAD_OUT_OF_RANGE);
  const auto blocks = static_cast<uint32_t>((tokens + kWarps - 1) / kWarps);
  const Sampling sampling{experts_chosen, factors,  kept,    choices, logits, draws, tokens,
                          experts,        stages,   static_cast<uint32_t>(layer),    2 * epsilon,
                          threshold,      untrusted};
  return launch(router_sample_kernel, {dim3(blocks), 32 * kWarps}, stream, sampling);
}

}  // namespace ROUTEGRAD_VARIANT
