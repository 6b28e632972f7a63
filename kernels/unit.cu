// Single instructions as launchers, so that the simulator's reading of them can be held against hardware: wgmma in every
// layout, TMA boxes byte for byte, clusters, cp.async, ldmatrix and stmatrix, warp collectives. One block each, or one
// cluster; no speed intended.
#include "common/ptx.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kDepth = 64;  // of the wgmma tiles

// ---- wgmma: C[64, N] = A[64, 64] · B[64, N]
template <int N>
struct alignas(1024) WgmmaTiles {
  bf16 a[64 * kDepth];
  bf16 b[N * kDepth];
  uint64_t loaded;
};

template <Major MAJOR>
DEV uint64_t descriptor(uint32_t swizzle, const void* tile, int k16, int rows) {
  if (swizzle == 1) return wgmma_descriptor<MAJOR, Swizzle::Span128>(tile, k16, rows, kDepth);
  if (swizzle == 2) return wgmma_descriptor<MAJOR, Swizzle::Span64>(tile, k16, rows, kDepth);
  return wgmma_descriptor<MAJOR, Swizzle::Span32>(tile, k16, rows, kDepth);
}

// Loads a tile of rows x 64 atom by atom; an atom is one swizzle span along the contiguous dimension.
DEV void load_tile(bf16* tile, const TensorMap* map, uint64_t* bar, Major major, uint32_t swizzle, int rows) {
  const int span = static_cast<int>(span_bytes(static_cast<Swizzle>(swizzle))) / 2;  // elements
  const int contiguous = major == Major::K ? kDepth : rows, other = major == Major::K ? rows : kDepth;
  for (int atom = 0; atom < contiguous / span; ++atom)
    tma_load_2d(tile + atom * span * other, map, bar, atom * span, 0);
}

template <int N, Major A_MAJOR, Major B_MAJOR, bool A_IN_REGISTERS>
__global__ void __launch_bounds__(128) wgmma_kernel(const __grid_constant__ TensorMap map_a,
                                                    const __grid_constant__ TensorMap map_b, float* c, const bf16* a,
                                                    uint32_t swizzle) {
  if constexpr (!kCompilesHopper) return;
  DYNAMIC_SHARED(WgmmaTiles<N>, s);
  const int t = static_cast<int>(threadIdx.x), row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  if (t == 0) {
    mbar_init(&s.loaded, 1);
    fence_mbar_init();
  }
  __syncthreads();
  if (t == 0) {
    mbar_expect_tx(&s.loaded, (64 + N) * kDepth * 2);
    load_tile(s.a, &map_a, &s.loaded, A_MAJOR, swizzle, 64);
    load_tile(s.b, &map_b, &s.loaded, B_MAJOR, swizzle, N);
  }
  mbar_wait(&s.loaded, 0);
  uint32_t fragment[kDepth / 16][4];
  for (int i = 0; A_IN_REGISTERS && i < kDepth / 4; ++i) {
    const int k16 = i / 4, half_k = i % 4 / 2, half_row = i % 2;
    const bf16* pair = a + (row + 8 * half_row) * kDepth + 16 * k16 + 8 * half_k + column;  // K-major
    fragment[k16][i % 4] = *reinterpret_cast<const uint32_t*>(pair);
  }
  float d[N / 2];
  wgmma_fence();
#pragma unroll
  for (int k16 = 0; k16 < kDepth / 16; ++k16) {
    const uint64_t b = descriptor<B_MAJOR>(swizzle, s.b, k16, N);
    if constexpr (A_IN_REGISTERS)
      wgmma_a_registers<N, B_MAJOR>(d, fragment[k16], b, k16 > 0);
    else
      wgmma<N, A_MAJOR, B_MAJOR>(d, descriptor<A_MAJOR>(swizzle, s.a, k16, 64), b, k16 > 0);
  }
  wgmma_commit();
  wgmma_wait<0>(d);
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[(row + 8 * (i / 2)) * N + 8 * j + column + i % 2] = d[4 * j + i];
}

static routegrad_status tile_map(TensorMap* map, const void* p, uint64_t rows, Major major, uint32_t swizzle) {
  const uint64_t contiguous = major == Major::K ? kDepth : rows, other = major == Major::K ? rows : kDepth;
  const Swizzle s = static_cast<Swizzle>(swizzle);
  return make_tensor_map<2>(map, {p, Element::Bf16, {contiguous, other}, {contiguous * 2},
                                  {span_bytes(s) / 2, static_cast<uint32_t>(other)}, s});
}

template <int N, Major A_MAJOR, Major B_MAJOR, bool A_IN_REGISTERS>
static routegrad_status launch_wgmma(float* c, const void* a, const void* b, uint32_t swizzle, routegrad_stream stream) {
  TensorMap map_a, map_b;
  if (const routegrad_status bad = tile_map(&map_a, a, 64, A_MAJOR, swizzle)) return bad;
  if (const routegrad_status bad = tile_map(&map_b, b, N, B_MAJOR, swizzle)) return bad;
  return launch(wgmma_kernel<N, A_MAJOR, B_MAJOR, A_IN_REGISTERS>, {1, 128, shared_bytes<WgmmaTiles<N>>}, stream, map_a,
                map_b, c, static_cast<const bf16*>(a), swizzle);
}

template <int N>
static routegrad_status choose_majors(float* c, const void* a, const void* b, bool a_mn, bool b_mn, bool registers,
                                      uint32_t swizzle, routegrad_stream stream) {
  constexpr Major K = Major::K, MN = Major::MN;
  if (registers)
    return b_mn ? launch_wgmma<N, K, MN, true>(c, a, b, swizzle, stream) : launch_wgmma<N, K, K, true>(c, a, b, swizzle, stream);
  if (a_mn)
    return b_mn ? launch_wgmma<N, MN, MN, false>(c, a, b, swizzle, stream) : launch_wgmma<N, MN, K, false>(c, a, b, swizzle, stream);
  return b_mn ? launch_wgmma<N, K, MN, false>(c, a, b, swizzle, stream) : launch_wgmma<N, K, K, false>(c, a, b, swizzle, stream);
}

routegrad_status unit_wgmma(float* c, const void* a, const void* b, int32_t n, int32_t a_mn_major, int32_t b_mn_major,
                            int32_t a_in_registers, int32_t swizzle, routegrad_stream stream) {
  REQUIRE_POINTER(unit_wgmma, c);
  REQUIRE_POINTER(unit_wgmma, a);
  REQUIRE_POINTER(unit_wgmma, b);
  REQUIRE(unit_wgmma, swizzle, 1 <= swizzle && swizzle <= 3, ROUTEGRAD_OUT_OF_RANGE);
  const int span = static_cast<int>(span_bytes(static_cast<Swizzle>(swizzle))) / 2;
  REQUIRE(unit_wgmma, n, !b_mn_major || n % span == 0, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(unit_wgmma, a_in_registers, !(a_in_registers && a_mn_major), ROUTEGRAD_OUT_OF_RANGE);
  const auto go = [&](auto chosen) {
    return chosen(c, a, b, a_mn_major != 0, b_mn_major != 0, a_in_registers != 0, static_cast<uint32_t>(swizzle), stream);
  };
  switch (n) {
    case 16: return go(choose_majors<16>);
    case 64: return go(choose_majors<64>);
    case 96: return go(choose_majors<96>);
    case 128: return go(choose_majors<128>);
    case 176: return go(choose_majors<176>);
    case 256: return go(choose_majors<256>);
    default: return refused(ROUTEGRAD_OUT_OF_RANGE, argument_place(unit_wgmma_parameters, "n"));
  }
}

// ---- TMA: one box, as bytes
constexpr int kMaxBoxBytes = 64 << 10;
struct alignas(1024) Box {
  uint8_t bytes[kMaxBoxBytes];
  uint64_t loaded;
};

__global__ void __launch_bounds__(128) tma_load_kernel(const __grid_constant__ TensorMap map, uint8_t* out, int rank, int x,
                                                       int y, int z, int bytes) {
  if constexpr (!kCompilesHopper) return;
  DYNAMIC_SHARED(Box, s);
  if (threadIdx.x == 0) {
    mbar_init(&s.loaded, 1);
    fence_mbar_init();
    mbar_expect_tx(&s.loaded, static_cast<uint32_t>(bytes));
    if (rank == 2)
      tma_load_2d(s.bytes, &map, &s.loaded, x, y);
    else
      tma_load_3d(s.bytes, &map, &s.loaded, x, y, z);
  }
  __syncthreads();
  mbar_wait(&s.loaded, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 128) out[i] = s.bytes[i];
}

__global__ void __launch_bounds__(128) tma_store_kernel(const __grid_constant__ TensorMap map, const uint8_t* in, int rank,
                                                        int x, int y, int z, int bytes) {
  if constexpr (!kCompilesHopper) return;
  DYNAMIC_SHARED(Box, s);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 128) s.bytes[i] = in[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (rank == 2)
    tma_store_2d(&map, s.bytes, x, y);
  else
    tma_store_3d(&map, s.bytes, x, y, z);
  bulk_commit();
  bulk_wait_read<0>();
}

static routegrad_status box_map(TensorMap* map, const void* tensor, const routegrad_unit_box& b) {
  const uint64_t row = static_cast<uint64_t>(b.extent[0]) * 2;
  const auto e = [&](int i) { return static_cast<uint64_t>(b.extent[i]); };
  const auto box = [&](int i) { return static_cast<uint32_t>(b.box[i]); };
  const Swizzle s = static_cast<Swizzle>(b.swizzle);
  if (b.rank == 2) return make_tensor_map<2>(map, {tensor, Element::Bf16, {e(0), e(1)}, {row}, {box(0), box(1)}, s});
  return make_tensor_map<3>(map, {tensor, Element::Bf16, {e(0), e(1), e(2)}, {row, row * e(1)}, {box(0), box(1), box(2)}, s});
}
static int box_bytes(const routegrad_unit_box& b) { return 2 * b.box[0] * b.box[1] * (b.rank == 3 ? b.box[2] : 1); }
static bool usable(const routegrad_unit_box* b) {
  return b && (b->rank == 2 || b->rank == 3) && 0 <= b->swizzle && b->swizzle <= 3 && box_bytes(*b) <= kMaxBoxBytes;
}

routegrad_status unit_tma_load(void* out, const void* tensor, const routegrad_unit_box* box, routegrad_stream stream) {
  REQUIRE_POINTER(unit_tma_load, out);
  REQUIRE_POINTER(unit_tma_load, tensor);
  REQUIRE(unit_tma_load, box, usable(box), ROUTEGRAD_OUT_OF_RANGE);
  TensorMap map;
  if (const routegrad_status bad = box_map(&map, tensor, *box)) return bad;
  return launch(tma_load_kernel, {1, 128, shared_bytes<Box>}, stream, map, static_cast<uint8_t*>(out), box->rank, box->at[0],
                box->at[1], box->at[2], box_bytes(*box));
}

routegrad_status unit_tma_store(void* tensor, const void* in, const routegrad_unit_box* box, routegrad_stream stream) {
  REQUIRE_POINTER(unit_tma_store, tensor);
  REQUIRE_POINTER(unit_tma_store, in);
  REQUIRE(unit_tma_store, box, usable(box), ROUTEGRAD_OUT_OF_RANGE);
  TensorMap map;
  if (const routegrad_status bad = box_map(&map, tensor, *box)) return bad;
  return launch(tma_store_kernel, {1, 128, shared_bytes<Box>}, stream, map, static_cast<const uint8_t*>(in), box->rank,
                box->at[0], box->at[1], box->at[2], box_bytes(*box));
}

// ---- a cluster of two: per round each block loads half a tile [64, 64] into the blocks of its mask
struct alignas(1024) ClusterTiles {
  bf16 tile[2][64 * 64];
  uint64_t full[2], empty[2];
};

__global__ void __launch_bounds__(64) multicast_kernel(const __grid_constant__ TensorMap map, bf16* out, int rounds,
                                                       uint32_t mask0, uint32_t mask1) {
  if constexpr (!kCompilesHopper) return;
  DYNAMIC_SHARED(ClusterTiles, s);
  const uint32_t me = cluster_rank(), masks[2] = {mask0, mask1};
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t halves = (mask0 >> me & 1) + (mask1 >> me & 1);  // that this block receives
  if (t == 0) {
    for (int i = 0; i < 2; ++i) {
      mbar_init(&s.full[i], 1);
      mbar_init(&s.empty[i], 2);  // both blocks have read
    }
    fence_mbar_init();
  }
  cluster_sync();
  if (t == 0) {
    for (int r = 0; r < rounds; ++r) {
      const int stage = r % 2;
      mbar_wait_cluster(&s.empty[stage], static_cast<uint32_t>(r / 2 % 2 ^ 1));
      mbar_expect_tx(&s.full[stage], halves * 32 * 64 * 2);
      tma_load_2d_multicast(s.tile[stage] + me * 32 * 64, &map, &s.full[stage], 0, r * 64 + static_cast<int>(me) * 32,
                            static_cast<uint16_t>(masks[me]));
    }
  }
  if (t >= 32) {
    for (int r = 0; r < rounds; ++r) {
      const int stage = r % 2;
      mbar_wait(&s.full[stage], static_cast<uint32_t>(r / 2 % 2));
      for (int half = 0; half < 2; ++half) {
        if (!(masks[half] >> me & 1)) continue;
        for (int i = t - 32; i < 32 * 64; i += 32) {
          const int row = half * 32 + i / 64, column = i % 64;
          out[((static_cast<size_t>(blockIdx.x) * rounds + r) * 64 + row) * 64 + column] =
              s.tile[stage][row * 64 + (column / 8 ^ (row & 7)) * 8 + column % 8];
        }
      }
      __syncwarp();
      if (t < 34) mbar_arrive_remote(&s.empty[stage], static_cast<uint32_t>(t - 32));
    }
  }
  __syncwarp();
  cluster_sync();  // no block ends while the other may still write into it
}

routegrad_status unit_multicast(void* out, const void* tensor, int32_t rounds, int32_t clusters, int32_t mask0, int32_t mask1,
                                routegrad_stream stream) {
  REQUIRE_POINTER(unit_multicast, out);
  REQUIRE_POINTER(unit_multicast, tensor);
  REQUIRE(unit_multicast, rounds, rounds > 0, ROUTEGRAD_OUT_OF_RANGE);
  TensorMap map;
  const uint64_t rows = 64ull * static_cast<uint64_t>(rounds);
  if (const routegrad_status bad =
          make_tensor_map<2>(&map, {tensor, Element::Bf16, {64, rows}, {128}, {64, 32}, Swizzle::Span128}))
    return bad;
  return launch(multicast_kernel, {static_cast<unsigned>(2 * clusters), 64, shared_bytes<ClusterTiles>, 2}, stream, map,
                static_cast<bf16*>(out), rounds, static_cast<uint32_t>(mask0), static_cast<uint32_t>(mask1));
}

// ---- cp.async and matrices: out[64, 64] = rows of `in`, row i from index[i] (negative: zeros), cut after `columns`;
// then transposed 8 x 8 by 8 x 8 through ldmatrix and stmatrix when asked
struct alignas(128) GatherTile {
  bf16 rows[64 * 64];
  uint64_t loaded;
};

__global__ void __launch_bounds__(128) gather_kernel(bf16* out, const bf16* in, const int* index, int columns, int transpose,
                                                     int by_mbarrier) {
  if constexpr (!kCompilesHopper) return;
  DYNAMIC_SHARED(GatherTile, s);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) mbar_init(&s.loaded, 128);
  __syncthreads();
  for (int i = t; i < 64 * 8; i += 128) {  // 16-byte chunks
    const int row = i / 8, chunk = i % 8, left = (columns - chunk * 8) * 2;
    const uint32_t valid = index[row] < 0 || left <= 0 ? 0 : left < 16 ? static_cast<uint32_t>(left) : 16;
    cp_async_16(s.rows + row * 64 + chunk * 8, in + (valid ? index[row] * 64 + chunk * 8 : 0), valid);
  }
  if (by_mbarrier) {
    cp_async_mbar_arrive_noinc(&s.loaded);
    mbar_wait(&s.loaded, 0);
    cp_async_commit();
    cp_async_wait<0>();
  } else {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  const int warp = t / 32, lane = t % 32;
  for (int quad = warp; transpose && quad < 16; quad += 4) {  // four 8 x 8 matrices side by side
    bf16* row = s.rows + (quad / 2 * 8 + lane % 8) * 64 + quad % 2 * 32 + lane / 8 * 8;
    uint32_t r[4];
    ldmatrix_x4(r, row);
    __syncwarp();
    stmatrix_x4_trans(row, r[0], r[1], r[2], r[3]);
  }
  __syncthreads();
  for (int i = t; i < 64 * 64; i += 128) out[i] = s.rows[i];
}

routegrad_status unit_gather(void* out, const void* in, const int32_t* index, int32_t columns, int32_t transpose,
                             int32_t by_mbarrier, routegrad_stream stream) {
  REQUIRE_POINTER(unit_gather, out);
  REQUIRE_POINTER(unit_gather, in);
  REQUIRE_POINTER(unit_gather, index);
  REQUIRE(unit_gather, columns, 0 <= columns && columns <= 64, ROUTEGRAD_OUT_OF_RANGE);
  return launch(gather_kernel, {1, 128, shared_bytes<GatherTile>}, stream, static_cast<bf16*>(out),
                static_cast<const bf16*>(in), index, columns, transpose, by_mbarrier);
}

// ---- warps: out[row] = softmax of in[row], by shuffles, partials in shared memory, named barriers and a ballot;
// `warps_seen` counts, atomically, the warps that voted
struct WarpPartials {
  float maximum[8], sum[8];
};

__global__ void __launch_bounds__(256) softmax_kernel(float* out, int* warps_seen, const float* in, int columns) {
  DYNAMIC_SHARED(WarpPartials, s);
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  const float* row = in + static_cast<size_t>(blockIdx.x) * columns;
  float maximum = -INFINITY;
  for (int i = t; i < columns; i += 256) maximum = fmaxf(maximum, row[i]);
  for (int o = 16; o; o >>= 1) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, o));
  if (lane == 0) s.maximum[warp] = maximum;
  __syncthreads();
  for (int i = 0; i < 8; ++i) maximum = fmaxf(maximum, s.maximum[i]);
  float sum = 0;
  for (int i = t; i < columns; i += 256) sum += __expf(row[i] - maximum);
  for (int o = 16; o; o >>= 1) sum += __shfl_down_sync(~0u, sum, static_cast<unsigned>(o));
  if (lane == 0) s.sum[warp] = sum;
  named_bar_sync(1, 256);
  sum = 0;
  for (int i = 0; i < 8; ++i) sum += s.sum[i];
  for (int i = t; i < columns; i += 256)
    out[static_cast<size_t>(blockIdx.x) * columns + i] = __expf(row[i] - maximum) / sum;
  if (__popc(__ballot_sync(~0u, t % 2)) == 16 && lane == 0) atomicAdd(warps_seen, 1);
}

routegrad_status unit_softmax(float* out, int32_t* warps_seen, const float* in, int32_t rows, int32_t columns,
                              routegrad_stream stream) {
  REQUIRE_POINTER(unit_softmax, out);
  REQUIRE_POINTER(unit_softmax, in);
  REQUIRE(unit_softmax, rows, rows > 0, ROUTEGRAD_OUT_OF_RANGE);
  return launch(softmax_kernel, {static_cast<unsigned>(rows), 256, shared_bytes<WarpPartials>}, stream, out, warps_seen, in,
                columns);
}

}  // namespace ROUTEGRAD_VARIANT
