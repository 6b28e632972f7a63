// norm: RMSNorm (arXiv 1910.07467) and LayerNorm (1607.06450) of each row, the residual add before them, their gradients.
//   norm_forward          s = x + residual, rounded to bf16 and stored in sum; without a residual s = x
//                         y = r s ⊙ w,               r = 1 / √(mean(s²) + ε)   without a bias: RMSNorm
//                         y = r (s − mean(s)) ⊙ w + b, r = 1 / √(var(s) + ε)   with a bias: LayerNorm, var divided by D
//   norm_backward         with g = dy ⊙ w and x = s:
//                         dx = [skip +] r (g − r² mean(g ⊙ x) x)                            RMSNorm
//                         dx = [skip +] r (g − mean(g) − mean(g ⊙ x̂) x̂), x̂ = r (x − mean(x))  LayerNorm
//                         partials[0, run] = Σ dy ⊙ x̂ (RMSNorm: r x) and, for LayerNorm, partials[1, run] = Σ dy over the
//                         rows of each run
//   norm_weight_gradient  gradient = or += Σ over runs of one of the partials, in order: of w from the first [runs, D], of b
//                         from the second
// x, residual, sum, y, dx, skip, dy [T, D] bf16; w, b [D] bf16; partials [1 or 2, runs, D] f32; gradient [D] f32. D a
// multiple of 8, at most 8192. Assigned, but for gradient as `accumulate` says. residual and sum may both be null; skip,
// the gradient that reaches s past the norm, may be null. In place: sum may be x or residual, dx may be skip.
//
// Sums in f32, the variance about the mean that was found first (Σ x² − mean² would lose it where the mean is large).
// Backward computes mean and r again, since it reads the row anyway: two numbers a row less to keep.
// Deterministic: a sum over a row goes over a thread's columns, a warp's lanes (butterfly), the row's warps in order. The
// parameters' gradients go over the rows of a team in order, a run's teams in order, then warp w adds runs w, w + 8, ... and
// the eight warps are added in order. Runs depend on T alone, and so do the bytes.
//
// A row belongs to the 1, 2, 4 or 8 warps that share it, at most 4 times 16 bytes a thread, so that it is read once whatever
// the passes over it. Warps of different rows wait for nothing in common, so loads of some hide the sums of others. w and b
// are read for every row, from L1.
// Forward has the row in registers. Backward, whose sums are chains of latencies, has x, dy and skip of a row in shared
// memory, where each thread copies its own part of the next row (cp.async) while this one is computed: so no load waits for
// the sums or they for it, and of what is in flight nothing takes registers, which the parameters' gradients need.
//
// Bytes: forward 4·T·D, with residual 8·T·D; + 2·D, with a bias 4·D. Backward 6·T·D, with skip 8·T·D; + 2·D, and per
// parameter 8·runs·D + 4·D, 8·D to accumulate; runs = min(T / 8, 264) about: 1 to 2 percent at 16,384 rows. FLOPs: none on
// tensor cores. Floor: bytes / 4.3e12 s, of 16,384 × 2048 (the widest model) 62 µs with residual, 62 µs backward with skip.
#include "common/eight.cuh"
#include "common/ptx.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChunks = 4;                                 // of 8 columns, of a thread
constexpr int kMaxHidden = kWarps * 32 * 8 * kChunks;
constexpr int64_t kLeastRunRows = 8, kMostRuns = 264;      // two runs a multiprocessor of an H200, on any machine
constexpr int64_t kMaxRows = INT32_MAX;

int64_t run_rows(int64_t rows) {
  const int64_t shared = (rows + kMostRuns - 1) / kMostRuns;
  return shared > kLeastRunRows ? shared : kLeastRunRows;
}
int64_t run_count(int64_t rows) { return (rows + run_rows(rows) - 1) / run_rows(rows); }

// The fewest warps whose registers hold a row: 1, 2, 4 or 8.
int warps_of_row(int hidden) {
  int warps = 1;
  while (warps * 32 * 8 * kChunks < hidden) warps *= 2;
  return warps;
}

// Sums of a warp that the row's other warps wait for; two sets, so that one is written while the other is read.
struct Parts {
  float value[2][2][kWarps];  // [set][which sum][warp]
};

// The warps that share a row; a block has kWarps / warps teams.
struct Team {
  int warps, count, index, threads, thread, hidden, set = 0;

  DEV Team(int warps_of_row, int columns)
      : warps(warps_of_row),
        count(kWarps / warps_of_row),
        index(static_cast<int>(threadIdx.x) / (32 * warps_of_row)),
        threads(32 * warps_of_row),
        thread(static_cast<int>(threadIdx.x) % (32 * warps_of_row)),
        hidden(columns) {}

  DEV int column(int chunk) const { return 8 * (thread + chunk * threads); }
  DEV bool has(int chunk) const { return column(chunk) < hidden; }

  // Sums over the row, the same in every thread of the team.
  template <int N>
  DEV void sum(float (&v)[N], Parts& s) {
    for (int distance = 16; distance > 0; distance /= 2)
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] += __shfl_xor_sync(~0u, v[n], distance);
    if (warps == 1) return;
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int n = 0; n < N; ++n) s.value[set][n][threadIdx.x / 32] = v[n];
    named_bar_sync(1 + index, threads);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      v[n] = 0;
      for (int w = 0; w < warps; ++w) v[n] += s.value[set][n][index * warps + w];
    }
    set ^= 1;
  }
};

// 8 elements of a parameter: from L1 after the first row, so the simulator does not count them.
DEV Eight parameter(const bf16* from) { return unpack(__ldg(reinterpret_cast<const uint4*>(from))); }

// A thread's part of a row; zeros past the last column.
struct Row {
  uint4 chunk[kChunks];

  DEV void load(const bf16* row, const Team& team) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      chunk[i] = team.has(i) ? ld_global(reinterpret_cast<const uint4*>(row + team.column(i))) : make_uint4(0, 0, 0, 0);
  }
};

// body(value, ...) for the thread's elements of the row.
template <class Body>
DEV void each(const Row& row, const Team& team, Body body) {
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (!team.has(i)) continue;
    const Eight v = unpack(row.chunk[i]);
#pragma unroll
    for (int k = 0; k < 8; ++k) body(v.value[k]);
  }
}

// ---- forward
struct Forward {
  bf16 *y, *sum;
  const bf16 *x, *residual, *weight, *bias;
  int64_t rows;
  int hidden, warps;
  float eps;
};

// Grid: one team a row.
template <bool LAYER>
__global__ void __launch_bounds__(kThreads) norm_forward_kernel(const __grid_constant__ Forward p) {
  DYNAMIC_SHARED(Parts, s);
  Team team(p.warps, p.hidden);
  const int64_t row = int64_t{blockIdx.x} * team.count + team.index, start = row * p.hidden;
  if (row >= p.rows) return;
  Row x;
  x.load(p.x + start, team);
  if (p.residual) {
    Row more;
    more.load(p.residual + start, team);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (!team.has(i)) continue;
      Eight a = unpack(x.chunk[i]);
      const Eight b = unpack(more.chunk[i]);
#pragma unroll
      for (int k = 0; k < 8; ++k) a.value[k] += b.value[k];
      x.chunk[i] = pack(a);
      st_global(reinterpret_cast<uint4*>(p.sum + start + team.column(i)), x.chunk[i]);
    }
  }
  const float width = static_cast<float>(p.hidden);
  float mean = 0;
  if (LAYER) {
    float sum[1] = {0};
    each(x, team, [&](float v) { sum[0] += v; });
    team.sum(sum, s);
    mean = sum[0] / width;
  }
  float squares[1] = {0};
  each(x, team, [&](float v) { squares[0] += (v - mean) * (v - mean); });
  team.sum(squares, s);
  const float r = 1 / sqrtf(squares[0] / width + p.eps);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (!team.has(i)) continue;
    Eight v = unpack(x.chunk[i]);
    const Eight w = parameter(p.weight + team.column(i));
#pragma unroll
    for (int k = 0; k < 8; ++k) v.value[k] = (v.value[k] - mean) * r * w.value[k];
    if (LAYER) {
      const Eight b = parameter(p.bias + team.column(i));
#pragma unroll
      for (int k = 0; k < 8; ++k) v.value[k] += b.value[k];
    }
    st_global(reinterpret_cast<uint4*>(p.y + start + team.column(i)), pack(v));
  }
}

// ---- backward
struct Backward {
  bf16* dx;
  float* partials;
  const bf16 *dy, *skip, *x, *weight;
  int rows, run_rows;
  int hidden, warps;
  float eps;
};

// A row of each team, as each thread copies and reads it: its own part.
struct Rows {
  uint4 x[kChunks][kThreads], dy[kChunks][kThreads], skip[kChunks][kThreads];

  DEV void copy(const Backward& p, const Team& team, int64_t start) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (!team.has(i)) continue;
      const int64_t at = start + team.column(i);
      cp_async_16(&x[i][threadIdx.x], p.x + at);
      cp_async_16(&dy[i][threadIdx.x], p.dy + at);
      if (p.skip) cp_async_16(&skip[i][threadIdx.x], p.skip + at);
    }
  }
};

struct BackwardShared {
  Parts parts;
  union {
    Rows rows[2];              // this one and the next
    float sums[2 * kMaxHidden];  // [parameters, teams, D] of the rows of each team, once all are done
  };
};
static_assert(shared_bytes<BackwardShared> <= 99 * 1024);

// One row: dx, and what it adds to the parameters' gradients.
template <bool LAYER>
DEV void row_gradient(float (&dw)[kChunks][8], float (&db)[kChunks][8], Team& team, Parts& s, const Rows& row,
                      const Backward& p, int64_t start) {
  const float width = static_cast<float>(p.hidden);
  // body(x, dy, w) of the thread's elements.
  const auto all = [&](auto body) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (!team.has(i)) continue;
      const Eight a = unpack(row.x[i][threadIdx.x]), d = unpack(row.dy[i][threadIdx.x]);
      const Eight w = parameter(p.weight + team.column(i));
#pragma unroll
      for (int k = 0; k < 8; ++k) body(a.value[k], d.value[k] * w.value[k]);
    }
  };
  float mean = 0, mean_g = 0;
  if (LAYER) {
    float sums[2] = {0, 0};
    all([&](float v, float g) { sums[0] += v, sums[1] += g; });
    team.sum(sums, s);
    mean = sums[0] / width, mean_g = sums[1] / width;
  }
  float sums[2] = {0, 0};
  all([&](float v, float g) { sums[0] += (v - mean) * (v - mean), sums[1] += g * (v - mean); });
  team.sum(sums, s);
  const float r = 1 / sqrtf(sums[0] / width + p.eps), along = r * sums[1] / width;  // mean(g ⊙ x̂)
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (!team.has(i)) continue;
    const Eight a = unpack(row.x[i][threadIdx.x]), d = unpack(row.dy[i][threadIdx.x]);
    const Eight w = parameter(p.weight + team.column(i));
    Eight out{};
    if (p.skip) out = unpack(row.skip[i][threadIdx.x]);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float normal = (a.value[k] - mean) * r;
      out.value[k] += r * (d.value[k] * w.value[k] - mean_g - normal * along);
      dw[i][k] += d.value[k] * normal;
      if (LAYER) db[i][k] += d.value[k];
    }
    st_global(reinterpret_cast<uint4*>(p.dx + start + team.column(i)), pack(out));
  }
}

// Grid: runs of rows. On Hopper 128 registers do, and two blocks a multiprocessor; for the other GPUs the compiler takes more.
template <bool LAYER>
__global__ void __launch_bounds__(kThreads, kCompilesHopper ? 2 : 1)
    norm_backward_kernel(const __grid_constant__ Backward p) {
  constexpr int kVectors = LAYER ? 2 : 1;
  DYNAMIC_SHARED(BackwardShared, s);
  Team team(p.warps, p.hidden);
  const int first = static_cast<int>(blockIdx.x) * p.run_rows, count = min(p.run_rows, p.rows - first);
  float gradient[2][kChunks][8] = {};
  // Past the team's last row nothing is copied, but the group is counted.
  const auto copy = [&](int i, int set) {
    if (i < count) s.rows[set].copy(p, team, int64_t{first + i} * p.hidden);
    cp_async_commit();
  };
  copy(team.index, 0);
  for (int i = team.index, set = 0; i < count; i += team.count, set ^= 1) {
    copy(i + team.count, set ^ 1);
    cp_async_wait<1>();
    row_gradient<LAYER>(gradient[0], gradient[1], team, s.parts, s.rows[set], p, int64_t{first + i} * p.hidden);
  }
  __syncthreads();  // no team reads rows any more: sums lie there now
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (!team.has(i)) continue;
      auto* const to = reinterpret_cast<float4*>(s.sums + (v * team.count + team.index) * p.hidden + team.column(i));
      const auto& own = gradient[v][i];
      to[0] = make_float4(own[0], own[1], own[2], own[3]);
      to[1] = make_float4(own[4], own[5], own[6], own[7]);
    }
  __syncthreads();
  // A run's teams in order.
  for (int v = 0; v < kVectors; ++v)
    for (int column = 4 * static_cast<int>(threadIdx.x); column < p.hidden; column += 4 * kThreads) {
      const float* const from = s.sums + v * team.count * p.hidden + column;
      float4 sum = *reinterpret_cast<const float4*>(from);
      for (int t = 1; t < team.count; ++t) {
        const float4 next = *reinterpret_cast<const float4*>(from + t * p.hidden);
        sum = make_float4(sum.x + next.x, sum.y + next.y, sum.z + next.z, sum.w + next.w);
      }
      st_global(reinterpret_cast<float4*>(p.partials + (int64_t{v} * gridDim.x + blockIdx.x) * p.hidden + column), sum);
    }
}

// ---- the sum of the runs
constexpr int kRunsAhead = 8;  // loads of a thread under way together

struct GradientShared {
  float sum[kWarps][32];
};

// Grid: 32 columns a block.
__global__ void __launch_bounds__(kThreads)
    norm_weight_gradient_kernel(float* gradient, const float* partials, int runs, int hidden, bool accumulate) {
  DYNAMIC_SHARED(GradientShared, s);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = static_cast<int>(blockIdx.x) * 32 + lane;
  float sum = 0;
  for (int run = warp; run < runs; run += kWarps * kRunsAhead) {
    float next[kRunsAhead];
#pragma unroll
    for (int i = 0; i < kRunsAhead; ++i) {
      const int64_t at = run + i * kWarps;
      next[i] = at < runs && column < hidden ? ld_global_readonly(partials + at * hidden + column) : 0;
    }
#pragma unroll
    for (int i = 0; i < kRunsAhead; ++i) sum += next[i];
  }
  s.sum[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= hidden) return;
  for (int w = 1; w < kWarps; ++w) sum += s.sum[w][lane];
  st_global(gradient + column, accumulate ? ld_global(gradient + column) + sum : sum);
}

}  // namespace

#define REQUIRE_NORM_SIZES(launcher)                                                         \
  REQUIRE(launcher, rows, 1 <= rows && rows <= kMaxRows, ROUTEGRAD_OUT_OF_RANGE);            \
  REQUIRE(launcher, hidden, 1 <= hidden && hidden <= kMaxHidden, ROUTEGRAD_OUT_OF_RANGE);    \
  REQUIRE_MULTIPLE_OF_8(launcher, hidden)

routegrad_status norm_forward(void* y, void* sum, const void* x, const void* residual, const void* weight,
                              const void* bias, int64_t rows, int32_t hidden, float eps, routegrad_stream stream) {
  REQUIRE_POINTER(norm_forward, y);
  if (residual) REQUIRE_POINTER(norm_forward, sum);
  REQUIRE_POINTER(norm_forward, x);
  if (sum) REQUIRE_POINTER(norm_forward, residual);
  REQUIRE_POINTER(norm_forward, weight);
  if (bias) REQUIRE_POINTER(norm_forward, bias);
  REQUIRE_NORM_SIZES(norm_forward);
  REQUIRE(norm_forward, eps, eps >= 0, ROUTEGRAD_OUT_OF_RANGE);
  const int warps = warps_of_row(hidden), teams = kWarps / warps;
  const Forward p{static_cast<bf16*>(y),
                  static_cast<bf16*>(sum),
                  static_cast<const bf16*>(x),
                  static_cast<const bf16*>(residual),
                  static_cast<const bf16*>(weight),
                  static_cast<const bf16*>(bias),
                  rows,
                  hidden,
                  warps,
                  eps};
  const LaunchShape shape{dim3(static_cast<uint32_t>((rows + teams - 1) / teams)), kThreads, shared_bytes<Parts>};
  return bias ? launch(norm_forward_kernel<true>, shape, stream, p) : launch(norm_forward_kernel<false>, shape, stream, p);
}

routegrad_status norm_partials(uint64_t* floats, int64_t rows, int32_t hidden) {
  REQUIRE(norm_partials, floats, floats != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE_NORM_SIZES(norm_partials);
  *floats = static_cast<uint64_t>(run_count(rows)) * static_cast<uint64_t>(hidden);
  return ROUTEGRAD_OK;
}

routegrad_status norm_backward(void* dx, float* partials, const void* dy, const void* skip, const void* x,
                               const void* weight, int64_t rows, int32_t hidden, int32_t layernorm, float eps,
                               routegrad_stream stream) {
  REQUIRE_POINTER(norm_backward, dx);
  REQUIRE_POINTER(norm_backward, partials);
  REQUIRE_POINTER(norm_backward, dy);
  if (skip) REQUIRE_POINTER(norm_backward, skip);
  REQUIRE_POINTER(norm_backward, x);
  REQUIRE_POINTER(norm_backward, weight);
  REQUIRE_NORM_SIZES(norm_backward);
  REQUIRE(norm_backward, layernorm, layernorm == 0 || layernorm == 1, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(norm_backward, eps, eps >= 0, ROUTEGRAD_OUT_OF_RANGE);
  const Backward p{static_cast<bf16*>(dx),
                   partials,
                   static_cast<const bf16*>(dy),
                   static_cast<const bf16*>(skip),
                   static_cast<const bf16*>(x),
                   static_cast<const bf16*>(weight),
                   static_cast<int>(rows),
                   static_cast<int>(run_rows(rows)),
                   hidden,
                   warps_of_row(hidden),
                   eps};
  const dim3 grid(static_cast<uint32_t>(run_count(rows)));
  if (layernorm)
    return launch(norm_backward_kernel<true>, {grid, kThreads, shared_bytes<BackwardShared>}, stream, p);
  return launch(norm_backward_kernel<false>, {grid, kThreads, shared_bytes<BackwardShared>}, stream, p);
}

routegrad_status norm_weight_gradient(float* gradient, const float* partials, int64_t rows, int32_t hidden,
                                      int32_t accumulate, routegrad_stream stream) {
  REQUIRE_POINTER(norm_weight_gradient, gradient);
  REQUIRE_POINTER(norm_weight_gradient, partials);
  REQUIRE_NORM_SIZES(norm_weight_gradient);
  REQUIRE(norm_weight_gradient, accumulate, accumulate == 0 || accumulate == 1, ROUTEGRAD_OUT_OF_RANGE);
  const dim3 grid(static_cast<uint32_t>((hidden + 31) / 32));
  return launch(norm_weight_gradient_kernel, {grid, kThreads, shared_bytes<GradientShared>}, stream, gradient, partials,
                static_cast<int>(run_count(rows)), hidden, accumulate != 0);
}

}  // namespace ROUTEGRAD_VARIANT
