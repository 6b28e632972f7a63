// cross_entropy: the output head's loss, a chunk of tokens at a time. For token t with logits z = x_t Wᵀ and target y:
//   head_logits           z = x Wᵀ, kept in f32: in bf16 a logit of 20 would be off by up to 1/16
//                         statistics[t, c] = (m, Σ exp(z − m)) of columns 128 c … 128 c + 127, m their maximum
//   cross_entropy_rows    losses[t] = logsumexp(z_t) − z_t[y_t]
//                         dlogits[t, v] = factor (softmax(z_t)[v] − [v = y_t]), rounded to bf16; may be null
//   cross_entropy_mean    loss[0] = factor Σ_t losses[t]
//   gradient_scale        out = or += factor[0] in, element by element, both f32 or both bf16: what backward has left to
//                         do, since dx = dlogits W and dW = Σ dlogitsᵀ x are formed in forward by grouped_gemm
// x [T, D] bf16, W [V, D] bf16, logits [T, V] f32, statistics [T, C, 2] f32 with C = ⌈V / 128⌉, targets [T] i32, losses [T]
// f32, dlogits [T, V] bf16. D and V multiples of 8, pointers 16-byte aligned. All are assigned, out as `accumulate` says. A
// target outside 0 … V − 1 makes its loss NaN, so that the step is refused, and has no term in dlogits.
//
// A block has a token. It joins the row's statistics, so that a row is read once, for its gradient; without a gradient only
// the target's logit is. Statistics may be null in cross_entropy_rows: then the threads first read the row for them, each
// with a running maximum.
// Deterministic: a sum goes over a thread's columns or statistics, a warp's lanes, the warps in order; that of the losses
// likewise.
// Bytes: logits 2·(T·D + V·D) + 4·T·V + 8·T·C; rows 8·T·C, with gradient + 6·T·V, and 4·T·V in place of 8·T·C without
// statistics, + 12·T; mean 4·T; scale 8 or 4 an element, 12 or 6 to accumulate. FLOPs: 2·T·V·D of the logits. Floor:
// max(FLOPs / 790e12, bytes / 4.3e12) s; of 2,048 tokens and V = 128,256 the rows take 0.37 ms, the three products at
// D = 2048 4.1 ms.
#include "common/eight.cuh"
#include "common/epilogue_store_logits.cuh"
#include "common/gemm_launch.cuh"
#include "common/warp.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// `seen` with the logits z.
DEV void see(Softmax& seen, float4 z) {
  const float most = fmaxf(fmaxf(z.x, z.y), fmaxf(z.z, z.w));
  if (most > seen.largest) {
    seen.sum *= exp_difference(seen.largest, most);
    seen.largest = most;
  }
  seen.sum += exp_difference(z.x, seen.largest) + exp_difference(z.y, seen.largest) +
              exp_difference(z.z, seen.largest) + exp_difference(z.w, seen.largest);
}

struct RowShared {
  Softmax warp[kWarps];
};

// Of the whole row, the same in every thread. statistics: the row's, or null.
DEV Softmax softmax_of_row(const float* z, const float2* statistics, int vocabulary, RowShared& s) {
  Softmax own;
  if (statistics) {
    for (int c = static_cast<int>(threadIdx.x); c < ceil_div(vocabulary, kStatisticColumns); c += kThreads) {
      const float2 of_columns = ld_global(statistics + c);
      own.join({of_columns.x, of_columns.y});
    }
  } else {
    for (int column = 8 * static_cast<int>(threadIdx.x); column < vocabulary; column += 8 * kThreads) {
      see(own, ld_global(reinterpret_cast<const float4*>(z + column)));
      see(own, ld_global(reinterpret_cast<const float4*>(z + column + 4)));
    }
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    Softmax other;
    other.largest = __shfl_xor_sync(~0u, own.largest, distance);
    other.sum = __shfl_xor_sync(~0u, own.sum, distance);
    own.join(other);
  }
  if (threadIdx.x % 32 == 0) s.warp[threadIdx.x / 32] = own;
  __syncthreads();
  Softmax all = s.warp[0];
  for (int w = 1; w < kWarps; ++w) all.join(s.warp[w]);
  return all;
}

// Grid: a block a token.
__global__ void __launch_bounds__(kThreads)
    cross_entropy_rows_kernel(float* losses, bf16* dlogits, const float* logits, const float2* statistics,
                              const int32_t* targets, int vocabulary, float factor) {
  DYNAMIC_SHARED(RowShared, s);
  const int64_t token = blockIdx.x;
  const float* z = logits + token * vocabulary;
  if (statistics) statistics += token * ceil_div(vocabulary, kStatisticColumns);
  const int target = __ldg(targets + token);  // one word for all threads: the simulator does not count it
  const Softmax row = softmax_of_row(z, statistics, vocabulary, s);
  const bool inside = 0 <= target && target < vocabulary;
  if (threadIdx.x == 0) {
    const float of_target = inside ? ld_global(z + target) : NAN;
    st_global(losses + token, row.largest - of_target + logf(row.sum));
  }
  if (!dlogits) return;
  const float scale = factor / row.sum;
  bf16* to = dlogits + token * vocabulary;
  for (int column = 8 * static_cast<int>(threadIdx.x); column < vocabulary; column += 8 * kThreads) {
    Eight d = join(ld_global(reinterpret_cast<const float4*>(z + column)),
                   ld_global(reinterpret_cast<const float4*>(z + column + 4)));
#pragma unroll
    for (int k = 0; k < 8; ++k)
      d.value[k] = scale * exp_difference(d.value[k], row.largest) - (column + k == target ? factor : 0.0f);
    store_eight(to + column, d);
  }
}

struct MeanShared {
  float warp[kWarps];
};

// One block.
__global__ void __launch_bounds__(kThreads)
    cross_entropy_mean_kernel(float* loss, const float* losses, int64_t tokens, float factor) {
  DYNAMIC_SHARED(MeanShared, s);
  float sum = 0;
  for (int64_t token = threadIdx.x; token < tokens; token += kThreads) sum += ld_global_readonly(losses + token);
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) s.warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kWarps; ++w) sum += s.warp[w];
  st_global(loss, factor * sum);
}

DEV float4 scaled(float4 v, float factor, float4 old) {
  return make_float4(factor * v.x + old.x, factor * v.y + old.y, factor * v.z + old.z, factor * v.w + old.w);
}
DEV uint4 scaled(uint4 v, float factor, uint4 old) {
  Eight sum = unpack(v);
  const Eight before = unpack(old);
#pragma unroll
  for (int k = 0; k < 8; ++k) sum.value[k] = factor * sum.value[k] + before.value[k];
  return pack(sum);
}

// 16 bytes a thread: 4 of f32, 8 of bf16. A zero has the same bits in both.
template <class Chunk>
__global__ void __launch_bounds__(kThreads)
    gradient_scale_kernel(Chunk* out, const Chunk* in, const float* factor, int64_t chunks, bool accumulate) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= chunks) return;
  st_global(out + at, scaled(ld_global_readonly(in + at), *factor, accumulate ? ld_global(out + at) : Chunk{}));
}

template <class Chunk>
routegrad_status scale_chunks(void* out, const void* in, const float* factor, int64_t chunks, bool accumulate,
                              routegrad_stream stream) {
  const dim3 grid(static_cast<uint32_t>((chunks + kThreads - 1) / kThreads));
  return launch(gradient_scale_kernel<Chunk>, {grid, kThreads}, stream, static_cast<Chunk*>(out),
                static_cast<const Chunk*>(in), factor, chunks, accumulate);
}

}  // namespace

routegrad_status head_logits(float* logits, float* statistics, const void* x, const void* w, int64_t tokens,
                             int32_t vocabulary, int32_t hidden, int32_t tile, routegrad_stream stream) {
  REQUIRE_POINTER(head_logits, logits);
  REQUIRE_POINTER(head_logits, statistics);
  REQUIRE_POINTER(head_logits, x);
  REQUIRE_POINTER(head_logits, w);
  REQUIRE(head_logits, tokens, 1 <= tokens && tokens <= kMaxRows, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_PRODUCT(head_logits, ROUTEGRAD_GEMM_HEAD_FORWARD, tokens, 1, vocabulary, hidden, 1);
  REQUIRE_TILE(head_logits, ROUTEGRAD_GEMM_HEAD_FORWARD);
  const ProductSizes sizes = product_sizes(ROUTEGRAD_GEMM_HEAD_FORWARD, tokens, 1, vocabulary, hidden);
  const GemmArguments arguments{x, w, nullptr, nullptr, tokens, vocabulary, nullptr, sizes};
  const LogitStatistics of_columns{reinterpret_cast<float2*>(statistics), vocabulary};
  if constexpr (kForAmpere)
    if (!on_hopper())
      return launch_mma<ROUTEGRAD_GEMM_HEAD_FORWARD>(
          arguments, MmaStoreLogits{{{}, logits, static_cast<int>(tokens), vocabulary, false}, of_columns}, tile, stream);
  StoreLogits store{};
  store.statistics = of_columns;
  if (const auto status = make_f32_output(&store, logits, vocabulary, tokens, 1, false)) return status;
  return launch_gemm<ROUTEGRAD_GEMM_HEAD_FORWARD, Gather::None>(arguments, store, tile, stream);
}

routegrad_status cross_entropy_rows(float* losses, void* dlogits, const float* logits, const float* statistics,
                                    const int32_t* targets, int64_t tokens, int32_t vocabulary, float factor,
                                    routegrad_stream stream) {
  REQUIRE_POINTER(cross_entropy_rows, losses);
  if (dlogits) REQUIRE_POINTER(cross_entropy_rows, dlogits);
  REQUIRE_POINTER(cross_entropy_rows, logits);
  if (statistics) REQUIRE_POINTER(cross_entropy_rows, statistics);
  REQUIRE_POINTER(cross_entropy_rows, targets);
  REQUIRE(cross_entropy_rows, tokens, 1 <= tokens && tokens <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(cross_entropy_rows, vocabulary, 1 <= vocabulary && vocabulary <= kMaxWidth, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(cross_entropy_rows, vocabulary);
  const dim3 grid(static_cast<uint32_t>(tokens));
  return launch(cross_entropy_rows_kernel, {grid, kThreads, shared_bytes<RowShared>}, stream, losses,
                static_cast<bf16*>(dlogits), logits, reinterpret_cast<const float2*>(statistics), targets, vocabulary,
                factor);
}

routegrad_status cross_entropy_mean(float* loss, const float* losses, int64_t tokens, float factor,
                                    routegrad_stream stream) {
  REQUIRE(cross_entropy_mean, loss, loss != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE_POINTER(cross_entropy_mean, losses);
  REQUIRE(cross_entropy_mean, tokens, 1 <= tokens && tokens <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  return launch(cross_entropy_mean_kernel, {dim3(1), kThreads, shared_bytes<MeanShared>}, stream, loss, losses, tokens,
                factor);
}

routegrad_status gradient_scale(void* out, const void* in, const float* factor, int64_t elements, int32_t bf16_elements,
                                int32_t accumulate, routegrad_stream stream) {
  REQUIRE_POINTER(gradient_scale, out);
  REQUIRE_POINTER(gradient_scale, in);
  REQUIRE(gradient_scale, factor, factor != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE(gradient_scale, elements, 1 <= elements && elements <= int64_t{1} << 38, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(gradient_scale, elements);
  REQUIRE(gradient_scale, bf16_elements, bf16_elements == 0 || bf16_elements == 1, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(gradient_scale, accumulate, accumulate == 0 || accumulate == 1, ROUTEGRAD_OUT_OF_RANGE);
  return bf16_elements ? scale_chunks<uint4>(out, in, factor, elements / 8, accumulate != 0, stream)
                       : scale_chunks<float4>(out, in, factor, elements / 4, accumulate != 0, stream);
}

}  // namespace ROUTEGRAD_VARIANT
