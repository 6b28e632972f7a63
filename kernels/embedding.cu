// embedding: rows of a table, and their gradient.
//   embedding_forward    y[t] = W[id_t]; NaN where the id is not in 0 … V − 1, so that the step is refused
//   embedding_order      order[i] = i, or previous[row_token[i]];  keys[i] = key(id_{order[i]}) >> shift, of it the lowest 8
//                        bits unless `whole`; key(id) = id, or V where it is not in the table
//   embedding_gradient   dW[v] = or += Σ dy[t] over the tokens with id v, t ascending; zeros where there is none (assign)
// W, y, dy [·, D] bf16; ids, order, keys, row_token [T] int32; dW [V, D] f32. D a multiple of 8, T < 2^31, V <= 2^24.
//
// The tokens are sorted by id a byte at a time, from the lowest: embedding_order gives the bytes, dispatch_choices (E =
// 256, K = 1) their stable order, and so on; a last call with `whole` gives the ids in order. Then blocks of 64 places of
// that order add their rows. A run of equal ids that lies in one block is stored at once; where it goes on into the next,
// its part goes to `parts` [blocks, 2, D]: the first slot for what comes from the block before, the second for what begins
// here. A second kernel adds the parts of each such run in the order of the blocks.
// Deterministic: no atomics; a sum runs over a block's rows, then over blocks, in the order of the tokens.
//
// Bytes: forward 4·T·D + 4·T; order 16·T a call; gradient 2·T·D + 4·min(T, V)·D + 8·T, and 4·V·D to assign or another
// 4·min(T, V)·D to accumulate. FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s; of 16,384 tokens, D = 2048 and V =
// 128,256 to assign 0.29 ms, nearly all of it zeros.
#include "common/eight.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockTokens = 64;               // of the sorted order
constexpr int kBlockColumns = kThreads * 8;    // a thread has 8
constexpr int kMaxVocabulary = 1 << 24, kMaxHidden = 1 << 16;

DEV bool in_table(int id, int vocabulary) { return 0 <= id && id < vocabulary; }

__global__ void __launch_bounds__(kThreads)
    embedding_forward_kernel(bf16* y, const bf16* w, const int32_t* ids, int64_t tokens, int vocabulary, int hidden) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int chunks = hidden / 8;
  const int64_t token = at / chunks;
  if (token >= tokens) return;
  const int id = ld_global_readonly(ids + token);
  constexpr uint32_t kNaN = 0x7fc07fc0;
  uint4 v = make_uint4(kNaN, kNaN, kNaN, kNaN);
  if (in_table(id, vocabulary))
    v = ld_global_readonly(reinterpret_cast<const uint4*>(w + int64_t{id} * hidden) + at % chunks);
  st_global(reinterpret_cast<uint4*>(y) + at, v);
}

__global__ void __launch_bounds__(kThreads)
    embedding_order_kernel(int32_t* order, int32_t* keys, const int32_t* previous, const int32_t* row_token,
                           const int32_t* ids, int tokens, int vocabulary, int shift, bool whole) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= tokens) return;
  const int token = previous ? ld_global_readonly(previous + ld_global_readonly(row_token + i)) : static_cast<int>(i);
  const int id = ld_global_readonly(ids + token), key = (in_table(id, vocabulary) ? id : vocabulary) >> shift;
  st_global(order + i, token);
  st_global(keys + i, whole ? key : key & 255);
}

__global__ void __launch_bounds__(kThreads) embedding_zero_kernel(float4* dw, int64_t chunks) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at < chunks) st_global(dw + at, make_float4(0, 0, 0, 0));
}

struct Gradient {
  float *dw, *parts;
  const bf16* dy;
  const int32_t *order, *keys;
  int tokens, vocabulary, hidden;
  bool accumulate;

  DEV float* part(int block, int slot, int column) const {
    return parts + (int64_t{block} * 2 + slot) * hidden + column;
  }
  // Places of a block: first … last − 1.
  DEV int first(int block) const { return block * kBlockTokens; }
  DEV int last(int block) const { return min(first(block) + kBlockTokens, tokens); }
  // Whether the run at the block's start began before, and the one at its end goes on.
  DEV bool comes(int block) const { return block > 0 && keys[first(block)] == keys[first(block) - 1]; }
  DEV bool goes_on(int block) const { return last(block) < tokens && keys[last(block)] == keys[last(block) - 1]; }

  DEV void store(int key, int column, const Eight& sum) const {
    if (key >= vocabulary) return;
    float4* to = reinterpret_cast<float4*>(dw + int64_t{key} * hidden + column);
    const float4 none = make_float4(0, 0, 0, 0);
    const float4 low = accumulate ? ld_global(to) : none, high = accumulate ? ld_global(to + 1) : none;
    const auto& v = sum.value;
    st_global(to, make_float4(low.x + v[0], low.y + v[1], low.z + v[2], low.w + v[3]));
    st_global(to + 1, make_float4(high.x + v[4], high.y + v[5], high.z + v[6], high.w + v[7]));
  }
};

DEV void add(Eight& sum, const Eight& v) {
#pragma unroll
  for (int k = 0; k < 8; ++k) sum.value[k] += v.value[k];
}

// Grid (blocks of places, column tiles).
__global__ void __launch_bounds__(kThreads) embedding_runs_kernel(const __grid_constant__ Gradient p) {
  const int block = static_cast<int>(blockIdx.x);
  const int column = static_cast<int>(blockIdx.y * kBlockColumns + threadIdx.x * 8);
  if (column >= p.hidden) return;
  const int first = p.first(block), last = p.last(block);
  bool comes = p.comes(block);
  Eight sum{};
  for (int i = first; i < last; ++i) {
    const int token = ld_global_readonly(p.order + i), key = ld_global_readonly(p.keys + i);
    add(sum, unpack(ld_global_readonly(reinterpret_cast<const uint4*>(p.dy + int64_t{token} * p.hidden + column))));
    const bool ends = i + 1 == last || ld_global_readonly(p.keys + i + 1) != key;
    if (!ends) continue;
    const bool on = i + 1 == last && p.goes_on(block);
    if (comes || on) {
      float4* to = reinterpret_cast<float4*>(p.part(block, comes ? 0 : 1, column));
      const auto& v = sum.value;
      st_global(to, make_float4(v[0], v[1], v[2], v[3]));
      st_global(to + 1, make_float4(v[4], v[5], v[6], v[7]));
    } else {
      p.store(key, column, sum);
    }
    comes = false;
    sum = Eight{};
  }
}

// The runs that begin in a block and go on after it. Grid as above.
__global__ void __launch_bounds__(kThreads) embedding_long_runs_kernel(const __grid_constant__ Gradient p) {
  int block = static_cast<int>(blockIdx.x);
  const int column = static_cast<int>(blockIdx.y * kBlockColumns + threadIdx.x * 8);
  const int key = ld_global_readonly(p.keys + p.last(block) - 1);
  const bool whole_block = ld_global_readonly(p.keys + p.first(block)) == key;
  if (column >= p.hidden || !p.goes_on(block) || (whole_block && p.comes(block))) return;
  Eight sum{};
  const auto add_part = [&](int slot) {
    const float4* from = reinterpret_cast<const float4*>(p.part(block, slot, column));
    const float4 low = ld_global_readonly(from), high = ld_global_readonly(from + 1);
    add(sum, {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}});
  };
  add_part(1);
  bool more = true;
  while (more) {
    ++block;
    add_part(0);
    more = ld_global_readonly(p.keys + p.last(block) - 1) == key && p.goes_on(block);
  }
  p.store(key, column, sum);
}

uint32_t blocks_of(int64_t count, int size) { return static_cast<uint32_t>((count + size - 1) / size); }

}  // namespace

#define REQUIRE_EMBEDDING_SIZES(launcher)                                                              \
  REQUIRE(launcher, tokens, 1 <= tokens && tokens <= INT32_MAX - kBlockTokens, ROUTEGRAD_OUT_OF_RANGE); \
  REQUIRE(launcher, vocabulary, 1 <= vocabulary && vocabulary <= kMaxVocabulary, ROUTEGRAD_OUT_OF_RANGE)
#define REQUIRE_EMBEDDING_WIDTH(launcher)                                                    \
  REQUIRE(launcher, hidden, 1 <= hidden && hidden <= kMaxHidden, ROUTEGRAD_OUT_OF_RANGE);    \
  REQUIRE_MULTIPLE_OF_8(launcher, hidden)

routegrad_status embedding_forward(void* y, const void* w, const int32_t* ids, int64_t tokens, int32_t vocabulary,
                                   int32_t hidden, routegrad_stream stream) {
  REQUIRE_POINTER(embedding_forward, y);
  REQUIRE_POINTER(embedding_forward, w);
  REQUIRE_POINTER(embedding_forward, ids);
  REQUIRE_EMBEDDING_SIZES(embedding_forward);
  REQUIRE_EMBEDDING_WIDTH(embedding_forward);
  REQUIRE(embedding_forward, tokens, tokens * (hidden / 8) <= int64_t{INT32_MAX} * kThreads, ROUTEGRAD_OVERFLOW);
  return launch(embedding_forward_kernel, {dim3(blocks_of(tokens * (hidden / 8), kThreads)), kThreads}, stream,
                static_cast<bf16*>(y), static_cast<const bf16*>(w), ids, tokens, vocabulary, hidden);
}

routegrad_status embedding_order(int32_t* order, int32_t* keys, const int32_t* previous, const int32_t* row_token,
                                 const int32_t* ids, int64_t tokens, int32_t vocabulary, int32_t shift, int32_t whole,
                                 routegrad_stream stream) {
  REQUIRE_POINTER(embedding_order, order);
  REQUIRE_POINTER(embedding_order, keys);
  if (row_token) REQUIRE_POINTER(embedding_order, previous);
  if (previous) REQUIRE_POINTER(embedding_order, row_token);
  REQUIRE_POINTER(embedding_order, ids);
  REQUIRE_EMBEDDING_SIZES(embedding_order);
  REQUIRE(embedding_order, shift, 0 <= shift && shift < 32, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(embedding_order, whole, whole == 0 || whole == 1, ROUTEGRAD_OUT_OF_RANGE);
  return launch(embedding_order_kernel, {dim3(blocks_of(tokens, kThreads)), kThreads}, stream, order, keys, previous,
                row_token, ids, static_cast<int>(tokens), vocabulary, shift, whole != 0);
}

routegrad_status embedding_parts(uint64_t* floats, int64_t tokens, int32_t hidden) {
  REQUIRE(embedding_parts, floats, floats != nullptr, ROUTEGRAD_NULL_POINTER);
  *floats = uint64_t{blocks_of(tokens, kBlockTokens)} * 2 * static_cast<uint64_t>(hidden);
  return ROUTEGRAD_OK;
}

routegrad_status embedding_gradient(float* dw, float* parts, const void* dy, const int32_t* order, const int32_t* keys,
                                    int64_t tokens, int32_t vocabulary, int32_t hidden, int32_t accumulate,
                                    routegrad_stream stream) {
  REQUIRE_POINTER(embedding_gradient, dw);
  REQUIRE_POINTER(embedding_gradient, parts);
  REQUIRE_POINTER(embedding_gradient, dy);
  REQUIRE_POINTER(embedding_gradient, order);
  REQUIRE_POINTER(embedding_gradient, keys);
  REQUIRE_EMBEDDING_SIZES(embedding_gradient);
  REQUIRE_EMBEDDING_WIDTH(embedding_gradient);
  REQUIRE(embedding_gradient, accumulate, accumulate == 0 || accumulate == 1, ROUTEGRAD_OUT_OF_RANGE);
  if (!accumulate) {
    const int64_t chunks = int64_t{vocabulary} * hidden / 4;
    if (const auto status = launch(embedding_zero_kernel, {dim3(blocks_of(chunks, kThreads)), kThreads}, stream,
                                   reinterpret_cast<float4*>(dw), chunks))
      return status;
  }
  const Gradient p{dw,
                   parts,
                   static_cast<const bf16*>(dy),
                   order,
                   keys,
                   static_cast<int>(tokens),
                   vocabulary,
                   hidden,
                   accumulate != 0};
  const LaunchShape shape{dim3(blocks_of(tokens, kBlockTokens), blocks_of(hidden, kBlockColumns)), kThreads};
  if (const auto status = launch(embedding_runs_kernel, shape, stream, p)) return status;
  return launch(embedding_long_runs_kernel, shape, stream, p);
}

}  // namespace ROUTEGRAD_VARIANT
