// What router_forward makes of a warpgroup's logits, in registers: scores, choices, and sums over tokens.
//
// A quad (4 lanes) holds a row: thread t of the warpgroup has z[4 j + 2 h + e], row 16 (t / 32) + (t % 32) / 4 + 8 h and
// expert 8 j + 2 (t % 4) + e. Padded experts hold -inf.
#pragma once
#include <float.h>

#include "router_tiles.cuh"
#include "warp.cuh"

namespace ROUTEGRAD_VARIANT {

struct RouterForward {
  float* scores;                // [T, E]
  float* log_sum_exp;           // [T]
  int32_t* choices;             // [T, K], ascending; null when K = 0
  float* partials;              // [ceil(T / 128), 2 E + 2]
  int32_t* first_non_finite;    // [1]
  const float* selection_bias;  // [E] or null
  F32Matrix w;                  // [E, D]
  int tokens, experts, choices_per_token, score;
};

// Per warp: sums of the scores and numbers of choices of each expert, then Σ lse² and Σ entropy.
template <int EXPERTS>
struct RouterSums {
  float of_warp[8][2 * EXPERTS + 2];
};

// A place in the order in which experts are chosen: higher values first, the lower expert first among equals.
struct Rank {
  float value;
  int expert;
  DEV bool before(const Rank& other) const {
    return value > other.value || (value == other.value && expert < other.expert);
  }
};

// The n-th element of row h of the fragment.
HOST_DEV constexpr int element(int n, int h) { return n / 2 * 4 + 2 * h + n % 2; }

template <int EXPERTS>
struct TokenRows {
  float (&v)[EXPERTS / 2];  // logits, then scores
  const RouterForward& r;
  int first_token;                                  // of the thread's two rows
  int experts, first_expert = threadIdx.x % 4 * 2;  // of all; of the thread

  DEV TokenRows(float (&logits)[EXPERTS / 2], const RouterForward& forward, int token)
      : v(logits),
        r(forward),
        first_token(token + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + threadIdx.x % 32 / 4),
        experts(forward.experts) {}

  DEV int token(int h) const { return first_token + 8 * h; }

  // The expert of element i, and whether there is such a one.
  DEV int expert_of(int i) const { return i / 4 * 8 + first_expert + i % 2; }
  DEV bool padded(int i) const { return expert_of(i) >= experts; }
  // Between passes: without it the compiler keeps every expert_of and padded in a register from one to the next.
  DEV void forget() {
    forget_origin(experts);
    forget_origin(first_expert);
  }

  // Turns logits into scores. Gives Σ_rows lse² and Σ_rows entropy of this thread's quad, on its first lane.
  DEV void score(float& square, float& entropy) {
    square = entropy = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = -INFINITY;
      bool finite = true;
#pragma unroll
      for (int n = 0; n < EXPERTS / 4; ++n) {
        const int i = element(n, h);
        if (padded(i))
          v[i] = -INFINITY;
        else
          finite &= fabsf(v[i]) <= FLT_MAX;
        highest = fmaxf(highest, v[i]);
      }
      highest = quad_max(highest);
      forget();
      float sum = 0, weighted = 0;
#pragma unroll
      for (int n = 0; n < EXPERTS / 4; ++n) {
        const int i = element(n, h);
        const float above = v[i] - highest, share = expf(above);
        sum += share;
        weighted += share > 0 ? share * above : 0;
        if (r.score == ROUTEGRAD_SCORE_SOFTMAX)
          v[i] = share;
        else if (r.score == ROUTEGRAD_SCORE_SIGMOID)
          v[i] = 1 / (1 + expf(-v[i]));
        else if (r.score == ROUTEGRAD_SCORE_RELU)
          v[i] = v[i] < 0 ? 0 : v[i];
      }
      sum = quad_sum(sum);
      forget();
      weighted = quad_sum(weighted);
      if (r.score == ROUTEGRAD_SCORE_SOFTMAX) {
        const float scale = 1 / sum;
#pragma unroll
        for (int n = 0; n < EXPERTS / 4; ++n) v[element(n, h)] *= scale;
      }
      const uint32_t finite_lanes = __ballot_sync(~0u, finite);
      if (threadIdx.x % 4 || token(h) >= r.tokens) continue;
      const float lse = highest + logf(sum);
      st_global(r.log_sum_exp + token(h), lse);
      square += lse * lse;
      if (r.score == ROUTEGRAD_SCORE_SOFTMAX) entropy += logf(sum) - weighted / sum;
      if ((finite_lanes >> threadIdx.x % 32 & 15) != 15) atomicMin(r.first_non_finite, token(h));
    }
  }

  DEV void store_scores() {
    forget();
    const bool pairs = experts % 2 == 0;  // then every pair is 8-byte aligned
#pragma unroll
    for (int i = 0; i < EXPERTS / 2; i += 2) {
      const int row = token(i / 2 % 2);
      if (row >= r.tokens || padded(i)) continue;
      float* to = r.scores + static_cast<int64_t>(row) * experts + expert_of(i);
      if (pairs) {
        st_global(reinterpret_cast<float2*>(to), make_float2(v[i], v[i + 1]));
      } else {
        st_global(to, v[i]);
        if (!padded(i + 1)) st_global(to + 1, v[i + 1]);
      }
    }
  }

  // Sums of the warp's scores, per expert.
  DEV void sum_scores(float* sums) {
    forget();
#pragma unroll
    for (int n = 0; n < EXPERTS / 4; ++n) {
      const int i = element(n, 0);
      const float sum = sum_of_quads((token(0) < r.tokens ? v[i] : 0) + (token(1) < r.tokens ? v[i + 2] : 0));
      if (threadIdx.x % 32 < 4 && !padded(i)) sums[expert_of(i)] = sum;
    }
  }

  // Turns scores into the values by which experts are chosen: score + bias, NaN as -inf. Padded experts come last: they
  // have -inf and the highest numbers.
  DEV void rank_scores() {
    forget();
#pragma unroll
    for (int i = 0; i < EXPERTS / 2; ++i) {
      if (r.selection_bias && !padded(i)) v[i] += ld_global_readonly(r.selection_bias + expert_of(i));
      if (v[i] != v[i] || padded(i)) v[i] = -INFINITY;
    }
  }

  // The last of the K experts that row h chooses: K times the best of those after the one found before.
  DEV Rank last_chosen(int h) {
    forget();
    Rank last{INFINITY, -1};
#pragma unroll 1
    for (int k = 0; k < r.choices_per_token; ++k) {
      Rank best{-INFINITY, INT32_MAX};
#pragma unroll
      for (int n = 0; n < EXPERTS / 4; ++n) {
        const int i = element(n, h);
        const Rank candidate{v[i], expert_of(i)};
        if (last.before(candidate) && candidate.before(best)) best = candidate;
      }
#pragma unroll
      for (int lane = 1; lane < 4; lane <<= 1) {
        const Rank other{__shfl_xor_sync(~0u, best.value, lane), __shfl_xor_sync(~0u, best.expert, lane)};
        if (other.before(best)) best = other;
      }
      last = best;
    }
    return last;
  }

  // Writes the choices in ascending order, and the warp's numbers of choices per expert. With K = 0 an expert counts where
  // its score is positive.
  DEV void choose(float* counts) {
    const int lane = threadIdx.x % 32;
    const Rank last[2] = {last_chosen(0), last_chosen(1)};
    forget();
    int chosen_below[2] = {0, 0};  // of the row, among the experts of earlier j
#pragma unroll
    for (int j = 0; j < EXPERTS / 8; ++j) {
      int chose[2] = {0, 0};  // of the warp's tokens
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        bool chosen[2];
        uint32_t votes[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = 4 * j + 2 * h + e;
          const bool wanted = r.choices_per_token ? !last[h].before({v[i], expert_of(i)}) : v[i] > 0;
          chosen[e] = wanted && token(h) < r.tokens && !padded(i);
          votes[e] = __ballot_sync(~0u, chosen[e]);
          chose[e] += __popc(votes[e] & 0x11111111u << lane % 4);
        }
        const uint32_t even = votes[0] >> (lane & ~3) & 15, odd = votes[1] >> (lane & ~3) & 15;
        const uint32_t below = (1u << lane % 4) - 1;
        int place = chosen_below[h] + __popc(even & below) + __popc(odd & below);
        if (r.choices_per_token) {
          int32_t* to = r.choices + static_cast<int64_t>(token(h)) * r.choices_per_token;
          if (chosen[0]) st_global(to + place++, expert_of(4 * j));
          if (chosen[1]) st_global(to + place, expert_of(4 * j + 1));
        }
        chosen_below[h] += __popc(even) + __popc(odd);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (lane < 4 && !padded(4 * j + e)) counts[expert_of(4 * j + e)] = static_cast<float>(chose[e]);
    }
  }
};

// All of it for the 128 tokens of a block, by the 256 threads that multiplied, numbered `thread`; `sums` may lie where the
// stages were.
template <int EXPERTS>
DEV void finish_tokens(float (&logits)[EXPERTS / 2], const RouterForward& forward, int first_token,
                       RouterSums<EXPERTS>& sums, int thread) {
  constexpr int kBarrier = 1;
  const int warp = thread / 32, experts = forward.experts;
  TokenRows<EXPERTS> rows(logits, forward, first_token + thread / 128 * 64);
  float square, entropy;
  rows.score(square, entropy);
  rows.store_scores();
  named_bar_sync(kBarrier, 256);  // both warpgroups have multiplied
  square = sum_of_quads(square);
  entropy = sum_of_quads(entropy);
  if (thread % 32 == 0) sums.of_warp[warp][2 * experts] = square, sums.of_warp[warp][2 * experts + 1] = entropy;
  rows.sum_scores(sums.of_warp[warp]);
  if (forward.choices_per_token) rows.rank_scores();
  rows.choose(sums.of_warp[warp] + experts);
  named_bar_sync(kBarrier, 256);
  for (int i = thread; i < 2 * experts + 2; i += 256) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < 8; ++w) sum += sums.of_warp[w][i];
    st_global(forward.partials + static_cast<int64_t>(blockIdx.x) * (2 * experts + 2) + i, sum);
  }
}

}  // namespace ROUTEGRAD_VARIANT
