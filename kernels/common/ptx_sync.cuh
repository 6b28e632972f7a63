// Synchronisation: shared addresses, register allotment, named barriers, proxy fences, mbarriers, clusters.
#pragma once
#include "simt.cuh"

namespace ROUTEGRAD_VARIANT {

// The 32-bit address of an object in this block's shared memory, as instructions and descriptors take it.
DEV uint32_t shared_address(const void* p, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(return static_cast<uint32_t>(__cvta_generic_to_shared(p));)
  ON_SIM(return sim::shared_address(p, at);)
}

// Hides from the compiler where a value comes from: it works out anew what depends on it, and so keeps no registers for it.
template <class Integer>
DEV void forget_origin([[maybe_unused]] Integer& value) {
  ON_GPU(asm volatile("" : "+r"(value));)
}

// ---- registers: a warpgroup gives registers back (dec) or takes them (inc), to REGISTERS a thread.
// Every warp of the warpgroup executes it. inc blocks until the block's pool has them.
template <int REGISTERS>
DEV void setmaxnreg_dec([[maybe_unused]] Where at = Where::current()) {
  static_assert(REGISTERS % 8 == 0 && 24 <= REGISTERS && REGISTERS <= 256);
  ON_GPU(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));)
  ON_SIM(sim::setmaxnreg(REGISTERS, false, at);)
}
template <int REGISTERS>
DEV void setmaxnreg_inc([[maybe_unused]] Where at = Where::current()) {
  static_assert(REGISTERS % 8 == 0 && 24 <= REGISTERS && REGISTERS <= 256);
  ON_GPU(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));)
  ON_SIM(sim::setmaxnreg(REGISTERS, true, at);)
}

// ---- named barriers 1 to 15 (0 is __syncthreads): `threads` is the number of threads that take part, in whole warps.
DEV void named_bar_sync(int id, int threads, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");)
  ON_SIM(sim::named_barrier(id, threads, true, at);)
}
DEV void named_bar_arrive(int id, int threads, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");)
  ON_SIM(sim::named_barrier(id, threads, false, at);)
}

// ---- fences
// Orders this thread's ordinary writes to shared memory before later asynchronous ones (TMA, wgmma). Every thread that
// wrote executes it, then a barrier, then one thread issues the asynchronous operation.
DEV void fence_proxy_async([[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("fence.proxy.async.shared::cta;" ::: "memory");)
  ON_SIM(sim::fence_proxy_async(at);)
}
// Makes this thread's mbarrier initialisations visible to TMA and to the cluster.
DEV void fence_mbar_init([[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");)
  ON_SIM(sim::fence_mbar_init(at);)
}

// ---- mbarriers. A phase ends when `count` arrivals and all announced bytes have come; phases alternate in parity.
DEV void mbar_init(uint64_t* bar, uint32_t count, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");)
  ON_SIM(sim::mbar_init(shared_address(bar, at), count, at);)
}
DEV void mbar_arrive(uint64_t* bar, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");)
  ON_SIM(sim::mbar_arrive(shared_address(bar, at), at);)
}
// Announces `bytes` more for the current phase, and arrives.
DEV void mbar_expect_tx(uint64_t* bar, uint32_t bytes, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
                      : "memory");)
  ON_SIM(sim::mbar_expect_tx(shared_address(bar, at), bytes, at);)
}
// Arrives at the mbarrier at the same place in block `rank` of the cluster (which may be this one).
DEV void mbar_arrive_remote(uint64_t* bar, uint32_t rank, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("{ .reg .b32 remote;\n"
                      "mapa.shared::cluster.u32 remote, %0, %1;\n"
                      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(bar)),
                      "r"(rank)
                      : "memory");)
  ON_SIM(sim::mbar_arrive_remote(shared_address(bar, at), rank, at);)
}
// Waits until the phase of this parity has ended. A fresh mbarrier is in phase 0, so waiting for parity 1 passes.
DEV void mbar_wait(uint64_t* bar, uint32_t parity, [[maybe_unused]] Where at = Where::current()) {
#ifdef __CUDACC__
  const uint32_t address = shared_address(bar);
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
  } while (!done);
#else
  sim::mbar_wait(shared_address(bar, at), parity, at);
#endif
}
// The same for a barrier at which blocks of the cluster arrive by mbar_arrive_remote.
DEV void mbar_wait_cluster(uint64_t* bar, uint32_t parity, [[maybe_unused]] Where at = Where::current()) {
#ifdef __CUDACC__
  const uint32_t address = shared_address(bar);
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p;\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
  } while (!done);
#else
  sim::mbar_wait(shared_address(bar, at), parity, at);
#endif
}

// ---- clusters
DEV uint32_t cluster_rank() {
#ifdef __CUDACC__
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return sim::cluster_rank();
#endif
}
// Every thread of every block of the cluster arrives and waits; what was written before is visible after.
DEV void cluster_arrive([[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");)
  ON_SIM(sim::cluster_arrive(at);)
}
DEV void cluster_wait([[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");)
  ON_SIM(sim::cluster_wait(at);)
}
DEV void cluster_sync([[maybe_unused]] Where at = Where::current()) {
  cluster_arrive(at);
  cluster_wait(at);
}

}  // namespace ROUTEGRAD_VARIANT
