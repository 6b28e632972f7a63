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
#include "common/epilogue_store_bf16.cuh"
#include "common/epilogue_store_f32.cuh"
#include "common/gemm_plan.cuh"
#include "common/gemm_tile.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int64_t kMaxRows = INT32_MAX - 4096;  // so that a row past the last tile is still an int
constexpr int kMaxWidth = 1 << 24, kMaxExperts = 1 << 16;

// A row-major bf16 array of `groups` matrices [rows, width], read in boxes of 64 columns.
routegrad_status bf16_map(TensorMap* map, const void* base, int64_t width, int64_t rows, int64_t groups, int box_rows) {
  const auto pitch = static_cast<uint64_t>(width) * 2;
  return make_tensor_map<3>(map,
                            {base,
                             Element::Bf16,
                             {static_cast<uint64_t>(width), static_cast<uint64_t>(rows), static_cast<uint64_t>(groups)},
                             {pitch, pitch * static_cast<uint64_t>(rows)},
                             {64, static_cast<uint32_t>(box_rows), 1},
                             Swizzle::Span128});
}

struct Arguments {
  const void *a, *b;
  const int32_t *a_rows, *b_rows;  // gather
  int64_t a_height, b_height;      // rows of the arrays (b: of one group)
  const int32_t* offsets;
  int product;
  ProductSizes sizes;
};

template <int SHAPE, Major A_MAJOR, Major B_MAJOR, bool RAGGED_DEPTH, Gather GATHER, class Epilogue>
routegrad_status launch_tile(const Arguments& arguments, const Epilogue& epilogue, bool skip_empty,
                             routegrad_stream stream) {
  constexpr TileShape kShape = kTileShapes[SHAPE];
  using T = GemmTraits<kShape.row_blocks, kShape.columns, kShape.pingpong, tile_stages(kShape, B_MAJOR == Major::MN),
                       A_MAJOR, B_MAJOR, RAGGED_DEPTH, GATHER>;
  static_assert(shared_bytes<GemmShared<T>> <= 227 * 1024);
  const ProductSizes& p = arguments.sizes;
  const auto columns = static_cast<int>(p.columns), depth = static_cast<int>(p.depth), rows = static_cast<int>(p.rows);
  GemmOperand a{{}, static_cast<const bf16*>(arguments.a), arguments.a_rows, RAGGED_DEPTH ? rows : depth};
  GemmOperand b{{}, static_cast<const bf16*>(arguments.b), arguments.b_rows, B_MAJOR == Major::MN ? columns : depth};
  routegrad_status status = bf16_map(&a.map, a.data, a.width, arguments.a_height, 1, 64);
  if (status == ROUTEGRAD_OK)
    status = bf16_map(&b.map, b.data, b.width, arguments.b_height, RAGGED_DEPTH ? 1 : p.groups,
                      B_MAJOR == Major::MN ? 64 : kShape.columns);
  if (status != ROUTEGRAD_OK) return status;
  typename T::Schedule schedule{arguments.offsets, p.groups, rows, columns, depth};
  if constexpr (RAGGED_DEPTH) schedule.skip_empty = skip_empty;
  const int64_t tiles = most_tiles(kShape, p), room = multiprocessors();
  const auto blocks = static_cast<uint32_t>(tiles < room ? tiles : room);
  return launch(gemm_kernel<T, Epilogue>, {dim3(blocks), kGemmThreads, shared_bytes<GemmShared<T>>}, stream, a, b,
                epilogue, schedule);
}

int shape_index(const Arguments& arguments, int tile) {
  const int wanted =
      tile == ROUTEGRAD_TILE_AUTO ? choose_tile(arguments.product, arguments.sizes, multiprocessors()).tile : tile;
  for (int i = 0; i < kTileShapeCount; ++i)
    if (kTileShapes[i].tile == wanted) return i;
  return 0;
}

template <Major B_MAJOR, Gather GATHER>
routegrad_status launch_ragged_m(const Arguments& arguments, void* out, int tile, routegrad_stream stream) {
  const ProductSizes& p = arguments.sizes;
  StoreBf16 store{{}, static_cast<bf16*>(out), static_cast<int>(p.columns)};
  if (const auto status = bf16_map(&store.map, out, p.columns, p.rows, 1, 64)) return status;
  switch (shape_index(arguments, tile)) {
    case 0:
      return launch_tile<0, Major::K, B_MAJOR, false, GATHER>(arguments, store, false, stream);
    case 1:
      return launch_tile<1, Major::K, B_MAJOR, false, GATHER>(arguments, store, false, stream);
    case 2:
      return launch_tile<2, Major::K, B_MAJOR, false, GATHER>(arguments, store, false, stream);
    case 3:
      return launch_tile<3, Major::K, B_MAJOR, false, GATHER>(arguments, store, false, stream);
    default:
      return launch_tile<4, Major::K, B_MAJOR, false, GATHER>(arguments, store, false, stream);
  }
}

template <Gather GATHER>
routegrad_status launch_ragged_k(const Arguments& arguments, float* dw, bool accumulate, int tile,
                                 routegrad_stream stream) {
  const ProductSizes& p = arguments.sizes;
  const auto width = static_cast<uint64_t>(p.columns), height = static_cast<uint64_t>(p.rows);
  StoreF32 store{{}, static_cast<int>(p.columns), accumulate};
  if (const auto status = make_tensor_map<3>(&store.map, {dw,
                                                          Element::F32,
                                                          {width, height, static_cast<uint64_t>(p.groups)},
                                                          {width * 4, width * height * 4},
                                                          {32, 64, 1},
                                                          Swizzle::Span128}))
    return status;
  switch (shape_index(arguments, tile)) {
    case 0:
      return launch_tile<0, Major::MN, Major::MN, true, GATHER>(arguments, store, accumulate, stream);
    case 1:
      return launch_tile<1, Major::MN, Major::MN, true, GATHER>(arguments, store, accumulate, stream);
    default:
      return launch_tile<3, Major::MN, Major::MN, true, GATHER>(arguments, store, accumulate, stream);
  }
}

bool tile_exists(int tile, int product) {
  if (tile == ROUTEGRAD_TILE_AUTO) return true;
  for (const TileShape& t : kTileShapes)
    if (t.tile == tile) return tile_serves(t, product);
  return false;
}
// Tiles and the steps between them are counted in 32 bits.
bool tiles_fit(const ProductSizes& p) {
  for (const TileShape& t : kTileShapes)
    if (most_tiles(t, p) > INT32_MAX / 2) return false;
  return true;
}

}  // namespace

#define REQUIRE_GEMM_SIZES(launcher, product_)                                                                       \
  REQUIRE(launcher, rows, 1 <= rows && rows <= kMaxRows, ROUTEGRAD_OUT_OF_RANGE);                                    \
  REQUIRE(launcher, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);                        \
  REQUIRE(launcher, n, 1 <= n && n <= kMaxWidth, ROUTEGRAD_OUT_OF_RANGE);                                            \
  REQUIRE_MULTIPLE_OF_8(launcher, n);                                                                                \
  REQUIRE(launcher, k, 1 <= k && k <= kMaxWidth, ROUTEGRAD_OUT_OF_RANGE);                                            \
  REQUIRE_MULTIPLE_OF_8(launcher, k);                                                                                \
  REQUIRE(launcher, k, static_cast<int64_t>(n) * k <= (int64_t{1} << 36), ROUTEGRAD_OVERFLOW); /* TMA: 2^40 bytes */ \
  REQUIRE(launcher, rows, tiles_fit(product_sizes(product_, rows, experts, n, k)), ROUTEGRAD_OVERFLOW)
#define REQUIRE_GEMM_LAUNCH(launcher, product_)                                           \
  REQUIRE_GEMM_SIZES(launcher, product_);                                                 \
  REQUIRE(launcher, offsets, offsets != nullptr || experts == 1, ROUTEGRAD_NULL_POINTER); \
  REQUIRE(launcher, tile, tile_exists(tile, product_), ROUTEGRAD_OUT_OF_RANGE);           \
  if (multiprocessors() < 1) return ROUTEGRAD_CUDA_ERROR | 100 << 8 /* cudaErrorNoDevice */
// An array that is not gathered holds every row of the product.
#define REQUIRE_HEIGHT(launcher, height, row_token)                                     \
  REQUIRE(launcher, height, 1 <= height && height <= kMaxRows, ROUTEGRAD_OUT_OF_RANGE); \
  REQUIRE(launcher, height, row_token != nullptr || height >= rows, ROUTEGRAD_OUT_OF_RANGE)

routegrad_status grouped_gemm_forward(void* out, const void* x, const void* w, const int32_t* offsets,
                                      const int32_t* row_token, int64_t rows, int64_t x_rows, int32_t experts,
                                      int32_t n, int32_t k, int32_t tile, routegrad_stream stream) {
  REQUIRE_POINTER(grouped_gemm_forward, out);
  REQUIRE_POINTER(grouped_gemm_forward, x);
  REQUIRE_POINTER(grouped_gemm_forward, w);
  REQUIRE_GEMM_LAUNCH(grouped_gemm_forward, ROUTEGRAD_GEMM_FORWARD);
  REQUIRE_HEIGHT(grouped_gemm_forward, x_rows, row_token);
  const Arguments arguments{x,
                            w,
                            row_token,
                            nullptr,
                            x_rows,
                            n,
                            offsets,
                            ROUTEGRAD_GEMM_FORWARD,
                            product_sizes(ROUTEGRAD_GEMM_FORWARD, rows, experts, n, k)};
  return row_token ? launch_ragged_m<Major::K, Gather::A>(arguments, out, tile, stream)
                   : launch_ragged_m<Major::K, Gather::None>(arguments, out, tile, stream);
}

routegrad_status grouped_gemm_input_gradient(void* dx, const void* dout, const void* w, const int32_t* offsets,
                                             const int32_t* row_token, int64_t rows, int64_t dout_rows, int32_t experts,
                                             int32_t n, int32_t k, int32_t tile, routegrad_stream stream) {
  REQUIRE_POINTER(grouped_gemm_input_gradient, dx);
  REQUIRE_POINTER(grouped_gemm_input_gradient, dout);
  REQUIRE_POINTER(grouped_gemm_input_gradient, w);
  REQUIRE_GEMM_LAUNCH(grouped_gemm_input_gradient, ROUTEGRAD_GEMM_INPUT_GRADIENT);
  REQUIRE_HEIGHT(grouped_gemm_input_gradient, dout_rows, row_token);
  const Arguments arguments{dout,
                            w,
                            row_token,
                            nullptr,
                            dout_rows,
                            n,
                            offsets,
                            ROUTEGRAD_GEMM_INPUT_GRADIENT,
                            product_sizes(ROUTEGRAD_GEMM_INPUT_GRADIENT, rows, experts, n, k)};
  return row_token ? launch_ragged_m<Major::MN, Gather::A>(arguments, dx, tile, stream)
                   : launch_ragged_m<Major::MN, Gather::None>(arguments, dx, tile, stream);
}

routegrad_status grouped_gemm_weight_gradient(float* dw, const void* dout, const void* x, const int32_t* offsets,
                                              const int32_t* dout_row_token, const int32_t* x_row_token, int64_t rows,
                                              int64_t dout_rows, int64_t x_rows, int32_t experts, int32_t n, int32_t k,
                                              int32_t accumulate, int32_t tile, routegrad_stream stream) {
  REQUIRE_POINTER(grouped_gemm_weight_gradient, dw);
  REQUIRE_POINTER(grouped_gemm_weight_gradient, dout);
  REQUIRE_POINTER(grouped_gemm_weight_gradient, x);
  REQUIRE_GEMM_LAUNCH(grouped_gemm_weight_gradient, ROUTEGRAD_GEMM_WEIGHT_GRADIENT);
  REQUIRE(grouped_gemm_weight_gradient, x_row_token, !dout_row_token || !x_row_token, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_HEIGHT(grouped_gemm_weight_gradient, dout_rows, dout_row_token);
  REQUIRE_HEIGHT(grouped_gemm_weight_gradient, x_rows, x_row_token);
  REQUIRE(grouped_gemm_weight_gradient, accumulate, accumulate == 0 || accumulate == 1, ROUTEGRAD_OUT_OF_RANGE);
  const Arguments arguments{dout,
                            x,
                            dout_row_token,
                            x_row_token,
                            dout_rows,
                            x_rows,
                            offsets,
                            ROUTEGRAD_GEMM_WEIGHT_GRADIENT,
                            product_sizes(ROUTEGRAD_GEMM_WEIGHT_GRADIENT, rows, experts, n, k)};
  if (dout_row_token) return launch_ragged_k<Gather::A>(arguments, dw, accumulate, tile, stream);
  if (x_row_token) return launch_ragged_k<Gather::B>(arguments, dw, accumulate, tile, stream);
  return launch_ragged_k<Gather::None>(arguments, dw, accumulate, tile, stream);
}

routegrad_status grouped_gemm_plan(routegrad_gemm_plan* plan, int32_t product, int64_t rows, int32_t experts, int32_t n,
                                   int32_t k, int32_t multiprocessors) {
  REQUIRE(grouped_gemm_plan, plan, plan != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE(grouped_gemm_plan, product, ROUTEGRAD_GEMM_FORWARD <= product && product <= ROUTEGRAD_GEMM_WEIGHT_GRADIENT,
          ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_GEMM_SIZES(grouped_gemm_plan, product);
  REQUIRE(grouped_gemm_plan, multiprocessors, multiprocessors >= 1, ROUTEGRAD_OUT_OF_RANGE);
  const ProductSizes sizes = product_sizes(product, rows, experts, n, k);
  const TileShape& t = choose_tile(product, sizes, multiprocessors);
  const int64_t tiles = most_tiles(t, sizes);
  *plan = {t.tile,
           t.rows(),
           t.columns,
           tile_stages(t, product != ROUTEGRAD_GEMM_FORWARD),
           static_cast<int32_t>(tiles < multiprocessors ? tiles : multiprocessors),
           0,
           estimate_clocks(t, sizes, multiprocessors)};
  return ROUTEGRAD_OK;
}

}  // namespace ROUTEGRAD_VARIANT
