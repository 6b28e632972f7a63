// grouped_gemm: the three products of a linear layer whose rows are sorted by expert. Rows r of expert e are
// offsets[e] <= r < offsets[e + 1]; W [E, N, K] is bf16; t(r) is row_token[r], or r where that is null.
//   forward          out[r, :] = W[e] · x[t(r), :]          x [X, K] bf16, out [R, N] bf16
//   input gradient   dx[r, :]  = W[e]ᵀ · dout[t(r), :]      dout [X, N] bf16, dx [R, K] bf16
//   weight gradient  dW[e]     = Σ_r dout[t(r), :] x[t'(r), :]ᵀ, r ascending    dW [E, N, K] f32; at most one is
//   gathered
// Sums in f32 on tensor cores. out and dx are assigned; dW is assigned, or added to when `accumulate` is set. Rows from
// offsets[E] on are not written, and rows of x and dout that no row of an expert names have no effect, whatever they
// hold. An expert without rows gets dW = 0 (assign) or keeps it (accumulate). offsets may be null when E = 1: the dense
// GEMM. R = `rows` is an upper bound: the host does not know offsets[E].
// N and K multiples of 8, pointers 16-byte aligned.
//
// Deterministic: each output element belongs to one tile, and a tile's sum runs in one order.
// FLOPs: 2·R·N·K each. Bytes: forward 2·(R·K + E·N·K + R·N), input gradient the same, weight gradient
// 2·R·(N + K) + 4·E·N·K, and 4·E·N·K more to accumulate. Floor: max(FLOPs / 790e12, bytes / 4.3e12) s.
#include "common/gemm_launch.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

template <int PRODUCT, Gather GATHER>
routegrad_status launch_ragged_m(const GemmArguments& arguments, void* out, int tile, routegrad_stream stream) {
  StoreBf16 store{};
  if (const auto status = make_output(&store.out, out, arguments.sizes.columns, 1, arguments.sizes.rows)) return status;
  return launch_gemm<PRODUCT, GATHER>(arguments, store, tile, stream);
}

template <Gather GATHER>
routegrad_status launch_ragged_k(GemmArguments arguments, float* dw, bool accumulate, int tile,
                                 routegrad_stream stream) {
  const ProductSizes& p = arguments.sizes;
  if constexpr (kForAmpere)
    if (arguments.skip_empty = accumulate; !on_hopper())
      return launch_mma<ROUTEGRAD_GEMM_WEIGHT_GRADIENT>(
          arguments, MmaStoreF32{{}, dw, static_cast<int>(p.rows), static_cast<int>(p.columns), accumulate}, tile, stream);
  StoreF32 store{};
  if (const auto status = make_f32_output(&store, dw, p.columns, p.rows, p.groups, accumulate)) return status;
  arguments.skip_empty = accumulate;
  return launch_gemm<ROUTEGRAD_GEMM_WEIGHT_GRADIENT, GATHER>(arguments, store, tile, stream);
}

}  // namespace

routegrad_status grouped_gemm_forward(void* out, const void* x, const void* w, const int32_t* offsets,
                                      const int32_t* row_token, int64_t rows, int64_t x_rows, int32_t experts,
                                      int32_t n, int32_t k, int32_t tile, routegrad_stream stream) {
  REQUIRE_POINTER(grouped_gemm_forward, out);
  REQUIRE_POINTER(grouped_gemm_forward, x);
  REQUIRE_POINTER(grouped_gemm_forward, w);
  REQUIRE_GEMM_LAUNCH(grouped_gemm_forward, ROUTEGRAD_GEMM_FORWARD, n, k, 1);
  REQUIRE_HEIGHT(grouped_gemm_forward, x_rows, row_token);
  const GemmArguments arguments{x,      w, row_token, nullptr,
                                x_rows, n, offsets,   product_sizes(ROUTEGRAD_GEMM_FORWARD, rows, experts, n, k)};
  return row_token ? launch_ragged_m<ROUTEGRAD_GEMM_FORWARD, Gather::A>(arguments, out, tile, stream)
                   : launch_ragged_m<ROUTEGRAD_GEMM_FORWARD, Gather::None>(arguments, out, tile, stream);
}

routegrad_status grouped_gemm_input_gradient(void* dx, const void* dout, const void* w, const int32_t* offsets,
                                             const int32_t* row_token, int64_t rows, int64_t dout_rows, int32_t experts,
                                             int32_t n, int32_t k, int32_t tile, routegrad_stream stream) {
  REQUIRE_POINTER(grouped_gemm_input_gradient, dx);
  REQUIRE_POINTER(grouped_gemm_input_gradient, dout);
  REQUIRE_POINTER(grouped_gemm_input_gradient, w);
  REQUIRE_GEMM_LAUNCH(grouped_gemm_input_gradient, ROUTEGRAD_GEMM_INPUT_GRADIENT, n, k, 1);
  REQUIRE_HEIGHT(grouped_gemm_input_gradient, dout_rows, row_token);
  const GemmArguments arguments{
      dout,      w, row_token, nullptr,
      dout_rows, n, offsets,   product_sizes(ROUTEGRAD_GEMM_INPUT_GRADIENT, rows, experts, n, k)};
  return row_token ? launch_ragged_m<ROUTEGRAD_GEMM_INPUT_GRADIENT, Gather::A>(arguments, dx, tile, stream)
                   : launch_ragged_m<ROUTEGRAD_GEMM_INPUT_GRADIENT, Gather::None>(arguments, dx, tile, stream);
}

routegrad_status grouped_gemm_weight_gradient(float* dw, const void* dout, const void* x, const int32_t* offsets,
                                              const int32_t* dout_row_token, const int32_t* x_row_token, int64_t rows,
                                              int64_t dout_rows, int64_t x_rows, int32_t experts, int32_t n, int32_t k,
                                              int32_t accumulate, int32_t tile, routegrad_stream stream) {
  REQUIRE_POINTER(grouped_gemm_weight_gradient, dw);
  REQUIRE_POINTER(grouped_gemm_weight_gradient, dout);
  REQUIRE_POINTER(grouped_gemm_weight_gradient, x);
  REQUIRE_GEMM_LAUNCH(grouped_gemm_weight_gradient, ROUTEGRAD_GEMM_WEIGHT_GRADIENT, n, k, 1);
  REQUIRE(grouped_gemm_weight_gradient, x_row_token, !dout_row_token || !x_row_token, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_HEIGHT(grouped_gemm_weight_gradient, dout_rows, dout_row_token);
  REQUIRE_HEIGHT(grouped_gemm_weight_gradient, x_rows, x_row_token);
  REQUIRE(grouped_gemm_weight_gradient, accumulate, accumulate == 0 || accumulate == 1, ROUTEGRAD_OUT_OF_RANGE);
  const GemmArguments arguments{
      dout,      x,      dout_row_token, x_row_token,
      dout_rows, x_rows, offsets,        product_sizes(ROUTEGRAD_GEMM_WEIGHT_GRADIENT, rows, experts, n, k)};
  if (dout_row_token) return launch_ragged_k<Gather::A>(arguments, dw, accumulate, tile, stream);
  if (x_row_token) return launch_ragged_k<Gather::B>(arguments, dw, accumulate, tile, stream);
  return launch_ragged_k<Gather::None>(arguments, dw, accumulate, tile, stream);
}

routegrad_status grouped_gemm_plan(routegrad_gemm_plan* plan, int32_t product, int64_t rows, int32_t experts, int32_t n,
                                   int32_t k, int32_t multiprocessors) {
  REQUIRE(grouped_gemm_plan, plan, plan != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE(grouped_gemm_plan, product, ROUTEGRAD_GEMM_FORWARD <= product && product <= ROUTEGRAD_GEMM_HEAD_FORWARD,
          ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_GEMM_SIZES(grouped_gemm_plan, product, n, k, 1);
  REQUIRE(grouped_gemm_plan, multiprocessors, multiprocessors >= 1, ROUTEGRAD_OUT_OF_RANGE);
  const ProductSizes sizes = product_sizes(product, rows, experts, n, k);
  const TileShape& t = choose_tile(product, sizes, multiprocessors);
  const int64_t tiles = most_tiles(t, sizes);
  *plan = {t.tile,
           t.rows(),
           t.columns,
           kForAmpere ? stages_of(t, product) : tile_stages(t, product),
           static_cast<int32_t>(tiles < multiprocessors ? tiles : multiprocessors),
           0,
           estimate_clocks(t, sizes, multiprocessors)};
  return ROUTEGRAD_OK;
}

}  // namespace ROUTEGRAD_VARIANT
