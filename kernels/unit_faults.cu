// Kernels with one fault each, for the tests of the simulator: it must name the fault. They would hang or corrupt a GPU,
// so the CUDA build has none of them.
#include "common/ptx.cuh"

namespace ROUTEGRAD_VARIANT {

#ifndef __CUDACC__

constexpr int kThreads = 384;

struct alignas(1024) FaultTile {
  bf16 tile[64 * 64];
  int words[kThreads];
  uint64_t bar, other;
};

// Deadlocks
static void waits_for_an_arrival_that_never_comes(FaultTile& s, int*, const TensorMap*) {
  if (threadIdx.x == 0) mbar_init(&s.bar, 2);
  __syncthreads();
  if (threadIdx.x == 0) mbar_arrive(&s.bar);
  mbar_wait(&s.bar, 0);
}
static void waits_for_more_bytes_than_come(FaultTile& s, int*, const TensorMap* map) {
  if (threadIdx.x == 0) {
    mbar_init(&s.bar, 1);
    fence_mbar_init();
    mbar_expect_tx(&s.bar, 64 * 64 * 2 + 16);
    tma_load_2d(s.tile, map, &s.bar, 0, 0);
  }
  __syncthreads();
  mbar_wait(&s.bar, 0);
}
static void barrier_lacks_a_warp(FaultTile&, int*, const TensorMap*) {
  if (threadIdx.x < 64) named_bar_sync(1, 96);
}
static void takes_more_registers_than_there_are(FaultTile&, int*, const TensorMap*) {
  // 384 threads start with 168 registers each. One warpgroup gives 16 a thread, two take 16 a thread.
  if (threadIdx.x < 128)
    setmaxnreg_dec<152>();
  else
    setmaxnreg_inc<184>();
}

// Misuse
static void barrier_takes_part_of_a_warp(FaultTile&, int*, const TensorMap*) {
  if (threadIdx.x % 32 < 16) named_bar_sync(1, 32);
}
static void setmaxnreg_by_half_a_warpgroup(FaultTile&, int*, const TensorMap*) {
  if (threadIdx.x < 64) setmaxnreg_dec<40>();
}
static void mbarrier_without_initialisation(FaultTile& s, int*, const TensorMap*) { mbar_wait(&s.bar, 0); }
static void mbarrier_initialised_twice(FaultTile& s, int*, const TensorMap*) {
  if (threadIdx.x == 0) {
    mbar_init(&s.bar, 1);
    mbar_init(&s.bar, 1);
  }
}
static void load_without_mbarrier_fence(FaultTile& s, int*, const TensorMap* map) {
  if (threadIdx.x == 0) {
    mbar_init(&s.bar, 1);
    mbar_expect_tx(&s.bar, 64 * 64 * 2);
    tma_load_2d(s.tile, map, &s.bar, 0, 0);
    mbar_wait(&s.bar, 0);
  }
}
static void too_many_arrivals(FaultTile& s, int*, const TensorMap*) {
  if (threadIdx.x == 0) {
    mbar_init(&s.bar, 2);
    mbar_expect_tx(&s.bar, 64);
    mbar_arrive(&s.bar);
    mbar_arrive(&s.bar);
  }
}
static void load_at_a_misaligned_address(FaultTile& s, int*, const TensorMap* map) {
  if (threadIdx.x == 0) {
    mbar_init(&s.bar, 1);
    fence_mbar_init();
    mbar_expect_tx(&s.bar, 64 * 64 * 2);
    tma_load_2d(s.tile + 64, map, &s.bar, 0, 0);
    mbar_wait(&s.bar, 0);
  }
}
static void multicast_beyond_the_cluster(FaultTile& s, int*, const TensorMap* map) {
  if (threadIdx.x == 0) {
    mbar_init(&s.bar, 1);
    fence_mbar_init();
    mbar_expect_tx(&s.bar, 64 * 64 * 2);
    tma_load_2d_multicast(s.tile, map, &s.bar, 0, 0, 3);
    mbar_wait(&s.bar, 0);
  }
}
static void ends_with_a_load_under_way(FaultTile& s, int*, const TensorMap* map) {
  if (threadIdx.x == 0) {
    mbar_init(&s.bar, 1);
    fence_mbar_init();
    mbar_expect_tx(&s.bar, 64 * 64 * 2);
    tma_load_2d(s.tile, map, &s.bar, 0, 0);
  }
}
static void load_of_half_a_chunk(FaultTile& s, int*, const TensorMap* map) {
  if (threadIdx.x == 0) {
    mbar_init(&s.bar, 1);
    fence_mbar_init();
    mbar_expect_tx(&s.bar, 64 * 64 * 2);
    tma_load_2d(s.tile, map, &s.bar, 4, 0);
  }
}
static void store_before_the_first_row(FaultTile& s, int*, const TensorMap* map) {
  if (threadIdx.x == 0) tma_store_2d(map, s.tile, 0, -8);
}
static void ends_with_a_store_unread(FaultTile& s, int*, const TensorMap* map) {
  if (threadIdx.x == 0) {
    fence_proxy_async();
    tma_store_2d(map, s.tile, 0, 0);
    bulk_commit();
  }
}
static void product_without_fence(FaultTile& s, int*, const TensorMap*) {
  float d[32] = {};
  if (threadIdx.x < 128) {
    const uint64_t desc = wgmma_descriptor<Major::K>(s.tile, 0, 64, 64);
    wgmma<64>(d, desc, desc, true);
    wgmma_commit();
    wgmma_wait<0>(d);
  }
}
static void product_not_waited_for(FaultTile& s, int*, const TensorMap*) {
  float d[32] = {};
  if (threadIdx.x < 128) {
    const uint64_t desc = wgmma_descriptor<Major::K>(s.tile, 0, 64, 64);
    wgmma_fence();
    wgmma<64>(d, desc, desc, true);
    wgmma_commit();
  }
}
static void threads_disagree_on_a_product(FaultTile& s, int*, const TensorMap*) {
  float d[32] = {};
  if (threadIdx.x < 128) {
    const uint64_t desc = wgmma_descriptor<Major::K>(s.tile, threadIdx.x == 5, 64, 64);
    wgmma_fence();
    wgmma<64>(d, desc, desc, true);
    wgmma_commit();
    wgmma_wait<0>(d);
  }
}
static void lanes_in_different_collectives(FaultTile&, int*, const TensorMap*) {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    __ballot_sync(~0u, true);
}

// Races, for the race build alone
static void race_between_threads(FaultTile& s, int* out, const TensorMap*) {
  s.words[threadIdx.x % 128] = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) out[0] = s.words[0];
}
static void race_without_barrier(FaultTile& s, int* out, const TensorMap*) {
  s.words[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = s.words[threadIdx.x ^ 32];
}
// Thread 0 hands a value to thread 32 by a flag.
static void hand_over(FaultTile& s, int* out, bool fenced) {
  if (threadIdx.x == 0) s.words[0] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    s.words[1] = 7;
    if (fenced) __threadfence();
    atomicAdd(&s.words[0], 1);
  }
  if (threadIdx.x == 32) {
    while (!atomicAdd(&s.words[0], 0)) __nanosleep(1);
    if (fenced) __threadfence();
    out[0] = s.words[1];
  }
}
static void race_through_a_flag_without_fence(FaultTile& s, int* out, const TensorMap*) { hand_over(s, out, false); }
static void no_race_through_a_flag_with_fences(FaultTile& s, int* out, const TensorMap*) { hand_over(s, out, true); }
static void race_in_global_memory(FaultTile&, int* out, const TensorMap*) { out[0] = static_cast<int>(threadIdx.x); }
static void store_without_proxy_fence(FaultTile& s, int*, const TensorMap* map) {
  if (threadIdx.x < 64) s.words[threadIdx.x] = 1;
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 64; i += kThreads) s.tile[i] = bf16{0};
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_proxy_async();  // its own writes only
    tma_store_2d(map, s.tile, 0, 0);
    bulk_commit();
    bulk_wait_read<0>();
  }
}
static void reads_before_the_load_is_waited_for(FaultTile& s, int* out, const TensorMap* map) {
  if (threadIdx.x == 0) {
    mbar_init(&s.bar, 1);
    fence_mbar_init();
    mbar_expect_tx(&s.bar, 64 * 64 * 2);
    tma_load_2d(s.tile, map, &s.bar, 0, 0);
  }
  __syncthreads();
  if (threadIdx.x < 32) mbar_wait(&s.bar, 0);
  out[threadIdx.x] = s.tile[threadIdx.x].bits;
}
static void overwrites_what_a_store_still_reads(FaultTile& s, int*, const TensorMap* map) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < 64 * 64; ++i) s.tile[i] = bf16{0};
    fence_proxy_async();
    tma_store_2d(map, s.tile, 0, 0);
    bulk_commit();
    s.tile[0] = bf16{1};
    bulk_wait_read<0>();
  }
}

struct Fault {
  void (*body)(FaultTile&, int*, const TensorMap*);
};
static const Fault kFaults[] = {
    {waits_for_an_arrival_that_never_comes}, {waits_for_more_bytes_than_come}, {barrier_lacks_a_warp},
    {takes_more_registers_than_there_are}, {barrier_takes_part_of_a_warp}, {setmaxnreg_by_half_a_warpgroup},
    {mbarrier_without_initialisation}, {mbarrier_initialised_twice}, {load_without_mbarrier_fence},
    {too_many_arrivals}, {load_at_a_misaligned_address}, {load_of_half_a_chunk},
    {store_before_the_first_row}, {multicast_beyond_the_cluster}, {ends_with_a_load_under_way},
    {ends_with_a_store_unread}, {product_without_fence}, {product_not_waited_for},
    {threads_disagree_on_a_product}, {lanes_in_different_collectives}, {race_between_threads},
    {race_without_barrier}, {race_through_a_flag_without_fence}, {race_in_global_memory},
    {store_without_proxy_fence}, {reads_before_the_load_is_waited_for}, {overwrites_what_a_store_still_reads},
    {no_race_through_a_flag_with_fences},
};

static void fault_kernel(int* out, int fault, const TensorMap map) {
  DYNAMIC_SHARED(FaultTile, s);
  kFaults[fault].body(s, out, &map);
}

#endif

routegrad_status unit_fault(int32_t* out, int32_t fault, routegrad_stream stream) {
  REQUIRE_POINTER(unit_fault, out);
#ifdef __CUDACC__
  (void)stream;
  return refused(ROUTEGRAD_OUT_OF_RANGE, argument_place(unit_fault_parameters, "fault"));
#else
  const int count = static_cast<int>(sizeof kFaults / sizeof *kFaults);
  REQUIRE(unit_fault, fault, 0 <= fault && fault < count, ROUTEGRAD_OUT_OF_RANGE);
  alignas(128) static bf16 square[64 * 64];  // what it holds does not matter
  TensorMap map;
  if (const routegrad_status bad =
          make_tensor_map<2>(&map, {square, Element::Bf16, {64, 64}, {128}, {64, 64}, Swizzle::Span128}))
    return bad;
  return launch(fault_kernel, {1, kThreads, shared_bytes<FaultTile>}, stream, out, fault, map);
#endif
}

}  // namespace ROUTEGRAD_VARIANT
