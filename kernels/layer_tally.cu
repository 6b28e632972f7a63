// layer_tally: what one micro-batch's routing in a MoE layer adds to the layer's statistics and to the step.
//   n_e = offsets[e + 1] − offsets[e], the tokens that chose e; H = Σ_t entropy of the token's scores as shares, in nats
//   stats [E + 2] f64 += (or =) n_0 … n_{E−1}, T, H
//   in a pass that trains also: load [E + 1] f64 += (or =) n_0 … n_{E−1}, T; flags [2] int32 = the least of what is there
//   and first_token + the first token whose logits were not finite, and the dispatch's fault bits so far
//   fractions [E] f32 = m_e / Σ m, m the load so far (over_step) or n: the f of the auxiliary loss; 0 where Σ m is 0
// mean_entropy [1] f32 of router_statistics gives H = T · mean; else entropy_parts of share_entropy, P of them; else H = 0.
//   share_entropy   parts[b] = Σ over the b-th 256 tokens of − Σ_e q_e ln q_e, q_e = max(s_e, 0) / Σ_i max(s_i, 0)
// E <= 256. Deterministic: sums in the order of the experts, or of a fixed tree.
// Bytes: about 24·E; share_entropy 4·T·E. FLOPs: none. Nothing beside a launch.
//   lossfree_update   b_e += u · sign(Σ load / E − load_e), the balancing of 2408.15664; sign(0) = 0
//   remoe_fractions   f_e = λ n_e / slots, slots = K·T: the regulariser of 2412.14711 is E Σ_e f_e P_e, P the mean scores
//   remoe_update      λ ·= factor^sign(N − K·T), N and T the pairs and tokens of all layers' loads [layers, E + 1]
#include "common/simt.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxExperts = 256;

struct TallyShared {
  double count[kMaxExperts];
};

struct Tally {
  double* stats;
  double* load;
  int32_t* flags;
  float* fractions;
  const int32_t* offsets;
  const int32_t* first_non_finite;
  const int32_t* fault;
  const float* mean_entropy;
  const double* entropy_parts;
  int64_t tokens, first_token;
  int parts, experts;
  bool trains, first_of_stats, first_of_step, over_step;
};

__global__ void __launch_bounds__(kThreads) layer_tally_kernel(Tally t) {
  DYNAMIC_SHARED(TallyShared, s);
  const int e = threadIdx.x;
  if (e < t.experts) {
    double n = ld_global_readonly(t.offsets + e + 1) - ld_global_readonly(t.offsets + e);
    st_global(t.stats + e, n + (t.first_of_stats ? 0 : ld_global(t.stats + e)));
    if (t.trains) {
      const double load = n + (t.first_of_step ? 0 : ld_global(t.load + e));
      st_global(t.load + e, load);
      if (t.over_step) n = load;
    }
    s.count[e] = n;
  }
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < t.experts; ++i) sum += s.count[i];
  if (e < t.experts) st_global(t.fractions + e, static_cast<float>(s.count[e] / (sum > 1 ? sum : 1)));
  if (e > 0) return;
  const auto tokens = static_cast<double>(t.tokens);
  double entropy = t.mean_entropy ? tokens * ld_global_readonly(t.mean_entropy) : 0;
  for (int i = 0; i < t.parts; ++i) entropy += ld_global_readonly(t.entropy_parts + i);
  double* stats = t.stats + t.experts;
  st_global(stats, tokens + (t.first_of_stats ? 0 : ld_global(stats)));
  st_global(stats + 1, entropy + (t.first_of_stats ? 0 : ld_global(stats + 1)));
  if (!t.trains) return;
  double* load = t.load + t.experts;
  st_global(load, tokens + (t.first_of_step ? 0 : ld_global(load)));
  const int64_t bad = t.first_non_finite ? ld_global_readonly(t.first_non_finite) : INT32_MAX;
  const int32_t token = bad < t.tokens ? static_cast<int32_t>(t.first_token + bad) : INT32_MAX;
  const int32_t before = t.first_of_step ? INT32_MAX : ld_global(t.flags);
  const int32_t fault = t.fault ? ld_global_readonly(t.fault) : 0;
  st_global(t.flags, token < before ? token : before);
  st_global(t.flags + 1, fault | (t.first_of_step ? 0 : ld_global(t.flags + 1)));
}

struct EntropyShared {
  double sum[kThreads];
};

// A token a thread.
__global__ void __launch_bounds__(kThreads)
    share_entropy_kernel(double* parts, const float* scores, int64_t tokens, int experts) {
  DYNAMIC_SHARED(EntropyShared, s);
  const int64_t token = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  float sum = 0, weighted = 0;
  for (int e = 0; e < experts && token < tokens; ++e) {
    const float score = ld_global_readonly(scores + token * experts + e);
    if (!(score > 0)) continue;
    sum += score;
    weighted += score * logf(score);
  }
  s.sum[threadIdx.x] = sum > 0 ? logf(sum) - weighted / sum : 0;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) s.sum[threadIdx.x] += s.sum[threadIdx.x + half];
  }
  if (threadIdx.x == 0) st_global(parts + blockIdx.x, s.sum[0]);
}

__global__ void __launch_bounds__(kThreads) lossfree_update_kernel(float* bias, const double* load, int experts, float rate) {
  double sum = 0;
  for (int i = 0; i < experts; ++i) sum += ld_global_readonly(load + i);
  const int e = threadIdx.x;
  if (e >= experts) return;
  const double mean = sum / experts, own = ld_global_readonly(load + e);
  const float sign = static_cast<float>(mean > own) - static_cast<float>(mean < own);
  st_global(bias + e, ld_global(bias + e) + rate * sign);
}

__global__ void __launch_bounds__(kThreads)
    remoe_fractions_kernel(float* fractions, const float* lambda, const int32_t* offsets, int64_t slots, int experts) {
  const int e = threadIdx.x;
  if (e >= experts) return;
  const double n = ld_global_readonly(offsets + e + 1) - ld_global_readonly(offsets + e);
  st_global(fractions + e, static_cast<float>(ld_global_readonly(lambda) * n / static_cast<double>(slots)));
}

struct RemoeShared {
  double surplus[kThreads];
};

// The surplus of pairs over K·T is a sum of whole numbers, exact in any order.
__global__ void __launch_bounds__(kThreads)
    remoe_update_kernel(float* lambda, const double* load, int layers, int experts, int top_k, double factor) {
  DYNAMIC_SHARED(RemoeShared, s);
  double surplus = 0;
  for (int i = threadIdx.x; i < layers * (experts + 1); i += kThreads) {
    const double count = ld_global_readonly(load + i);
    surplus += i % (experts + 1) < experts ? count : -top_k * count;
  }
  s.surplus[threadIdx.x] = surplus;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) s.surplus[threadIdx.x] += s.surplus[threadIdx.x + half];
  }
  if (threadIdx.x > 0) return;
  const double change = s.surplus[0] > 0 ? factor : s.surplus[0] < 0 ? 1 / factor : 1;
  st_global(lambda, static_cast<float>(ld_global(lambda) * change));
}

}  // namespace

#define REQUIRE_EXPERTS(launcher) \
  REQUIRE(launcher, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE)
#define REQUIRE_PRESENT(launcher, argument) REQUIRE(launcher, argument, (argument) != nullptr, ROUTEGRAD_NULL_POINTER)
#define REQUIRE_FLAG(launcher, argument) REQUIRE(launcher, argument, argument == 0 || argument == 1, ROUTEGRAD_OUT_OF_RANGE)

routegrad_status layer_tally(double* stats, double* load, int32_t* flags, float* fractions, const int32_t* offsets,
                             const int32_t* first_non_finite, const int32_t* fault, const float* mean_entropy,
                             const double* entropy_parts, int64_t tokens, int64_t first_token, int32_t parts,
                             int32_t experts, int32_t trains, int32_t first_of_stats, int32_t first_of_step,
                             int32_t over_step, routegrad_stream stream) {
  REQUIRE_PRESENT(layer_tally, stats);
  REQUIRE_PRESENT(layer_tally, load);
  REQUIRE_PRESENT(layer_tally, flags);
  REQUIRE_PRESENT(layer_tally, fractions);
  REQUIRE_PRESENT(layer_tally, offsets);
  REQUIRE(layer_tally, tokens, 1 <= tokens && tokens <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(layer_tally, first_token, 0 <= first_token && first_token <= INT32_MAX - tokens, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(layer_tally, parts, 0 <= parts && (parts == 0 || entropy_parts), ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_EXPERTS(layer_tally);
  REQUIRE_FLAG(layer_tally, trains);
  REQUIRE_FLAG(layer_tally, first_of_stats);
  REQUIRE_FLAG(layer_tally, first_of_step);
  REQUIRE_FLAG(layer_tally, over_step);
  const Tally tally{stats,        load,          flags,  fractions,   offsets, first_non_finite, fault,
                    mean_entropy, entropy_parts, tokens, first_token, parts,   experts,          trains != 0,
                    first_of_stats != 0, first_of_step != 0, over_step != 0};
  return launch(layer_tally_kernel, {dim3(1), kThreads, shared_bytes<TallyShared>}, stream, tally);
}

routegrad_status share_entropy(double* parts, const float* scores, int64_t tokens, int32_t experts,
                               routegrad_stream stream) {
  REQUIRE_PRESENT(share_entropy, parts);
  REQUIRE_PRESENT(share_entropy, scores);
  REQUIRE(share_entropy, tokens, 1 <= tokens && tokens <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_EXPERTS(share_entropy);
  const dim3 grid(static_cast<uint32_t>((tokens + kThreads - 1) / kThreads));
  return launch(share_entropy_kernel, {grid, kThreads, shared_bytes<EntropyShared>}, stream, parts, scores, tokens, experts);
}

routegrad_status lossfree_update(float* bias, const double* load, int32_t experts, float rate, routegrad_stream stream) {
  REQUIRE_PRESENT(lossfree_update, bias);
  REQUIRE_PRESENT(lossfree_update, load);
  REQUIRE_EXPERTS(lossfree_update);
  return launch(lossfree_update_kernel, {dim3(1), kThreads}, stream, bias, load, experts, rate);
}

routegrad_status remoe_fractions(float* fractions, const float* lambda, const int32_t* offsets, int64_t slots,
                                 int32_t experts, routegrad_stream stream) {
  REQUIRE_PRESENT(remoe_fractions, fractions);
  REQUIRE_PRESENT(remoe_fractions, lambda);
  REQUIRE_PRESENT(remoe_fractions, offsets);
  REQUIRE(remoe_fractions, slots, slots >= 1, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_EXPERTS(remoe_fractions);
  return launch(remoe_fractions_kernel, {dim3(1), kThreads}, stream, fractions, lambda, offsets, slots, experts);
}

routegrad_status remoe_update(float* lambda, const double* load, int32_t layers, int32_t experts, int32_t top_k,
                              double factor, routegrad_stream stream) {
  REQUIRE_PRESENT(remoe_update, lambda);
  REQUIRE_PRESENT(remoe_update, load);
  REQUIRE_EXPERTS(remoe_update);
  REQUIRE(remoe_update, layers, 1 <= layers && layers <= INT32_MAX / (experts + 1), ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(remoe_update, top_k, 1 <= top_k && top_k <= experts, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(remoe_update, factor, factor >= 1, ROUTEGRAD_OUT_OF_RANGE);
  const LaunchShape shape{dim3(1), kThreads, shared_bytes<RemoeShared>};
  return launch(remoe_update_kernel, shape, stream, lambda, load, layers, experts, top_k, factor);
}

}  // namespace ROUTEGRAD_VARIANT
