// Copies between global and shared memory: TMA (whole boxes, issued by one thread), cp.async (16 bytes a thread),
// and ldmatrix / stmatrix between shared memory and the registers of a warp.
#pragma once
#include "ptx_sync.cuh"
#include "tensor_map.cuh"

namespace ROUTEGRAD_VARIANT {

// ---- TMA loads: the box at (x, y[, z]), in elements, innermost first, into `dst`; its bytes count at `bar`.
// Elements outside the tensor read as zero and count as bytes. x may be negative, but begins on 16 bytes of its row.
DEV void tma_load_2d(void* dst, const TensorMap* map, uint64_t* bar, int x, int y,
                     [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(dst)),
                      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y)
                      : "memory");)
  ON_SIM(sim::tma_load(shared_address(dst, at), map, shared_address(bar, at), {x, y}, at);)
}
DEV void tma_load_3d(void* dst, const TensorMap* map, uint64_t* bar, int x, int y, int z,
                     [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(dst)),
                      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z)
                      : "memory");)
  ON_SIM(sim::tma_load(shared_address(dst, at), map, shared_address(bar, at), {x, y, z}, at);)
}
// The same into the same place of every block of the cluster whose bit stands in `blocks`, counted at each one's `bar`.
DEV void tma_load_2d_multicast(void* dst, const TensorMap* map, uint64_t* bar, int x, int y, uint16_t blocks,
                               [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(dst)),
                      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "h"(blocks)
                      : "memory");)
  ON_SIM(sim::tma_load_multicast(shared_address(dst, at), map, shared_address(bar, at), {x, y}, blocks, at);)
}
DEV void tma_load_3d_multicast(void* dst, const TensorMap* map, uint64_t* bar, int x, int y, int z, uint16_t blocks,
                               [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(dst)),
                      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z), "h"(blocks)
                      : "memory");)
  ON_SIM(sim::tma_load_multicast(shared_address(dst, at), map, shared_address(bar, at), {x, y, z}, blocks, at);)
}
DEV void tma_prefetch(const TensorMap* map) {
  ON_GPU(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");)
  ON_SIM((void)map;)
}

// ---- TMA stores: the box from `src` to (x, y[, z]); elements outside the tensor are not written.
// The box begins on 16 bytes of its row, and at no negative place.
DEV void tma_store_2d(const TensorMap* map, const void* src, int x, int y,
                      [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                      "r"(shared_address(src)), "r"(x), "r"(y)
                      : "memory");)
  ON_SIM(sim::tma_store(map, shared_address(src, at), {x, y}, at);)
}
DEV void tma_store_3d(const TensorMap* map, const void* src, int x, int y, int z,
                      [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                      "r"(shared_address(src)), "r"(x), "r"(y), "r"(z)
                      : "memory");)
  ON_SIM(sim::tma_store(map, shared_address(src, at), {x, y, z}, at);)
}
// The same for an f32 tensor, adding the box to what is there. Bitwise reproducible only where each element is added to
// once per launch: the order of several additions is not fixed.
DEV void tma_reduce_add_3d(const TensorMap* map, const void* src, int x, int y, int z,
                           [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::
                          "l"(map),
                      "r"(shared_address(src)), "r"(x), "r"(y), "r"(z)
                      : "memory");)
  ON_SIM(sim::tma_reduce_add(map, shared_address(src, at), {x, y, z}, at);)
}
// Closes the group of this thread's TMA stores since the last commit.
DEV void bulk_commit() {
  ON_GPU(asm volatile("cp.async.bulk.commit_group;" ::: "memory");)
  ON_SIM(sim::bulk_commit();)
}
// Waits until all but the last KEEP groups have read shared memory, which may then be overwritten; their global writes
// are visible only after bulk_wait or the kernel's end.
template <int KEEP>
DEV void bulk_wait_read([[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(KEEP) : "memory");)
  ON_SIM(sim::bulk_wait(KEEP, true, at);)
}
template <int KEEP>
DEV void bulk_wait([[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(KEEP) : "memory");)
  ON_SIM(sim::bulk_wait(KEEP, false, at);)
}

// ---- cp.async: 16 bytes, both sides 16-byte aligned. The first `valid` bytes are copied, the rest is zero; with
// valid = 0 nothing is read. An ordinary write: fence_proxy_async after the wait before TMA or wgmma sees it.
DEV void cp_async_16(void* dst, const void* src, uint32_t valid = 16, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(valid)
                      : "memory");)
  ON_SIM(sim::cp_async_16(shared_address(dst, at), src, valid, at);)
}
DEV void cp_async_commit() {
  ON_GPU(asm volatile("cp.async.commit_group;" ::: "memory");)
  ON_SIM(sim::cp_async_commit();)
}
template <int KEEP>
DEV void cp_async_wait([[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.wait_group %0;" ::"n"(KEEP) : "memory");)
  ON_SIM(sim::cp_async_wait(KEEP, at);)
}
// Arrives at `bar` once all earlier cp.async of this thread are done; counts as one of the expected arrivals.
DEV void cp_async_mbar_arrive_noinc(uint64_t* bar, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");)
  ON_SIM(sim::cp_async_mbar_arrive_noinc(shared_address(bar, at), at);)
}

// ---- ldmatrix, stmatrix: four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l mod 8 of matrix
// l / 8 (16 bytes). Register i of lane l holds row l / 4, columns 2 (l mod 4) and + 1 of matrix i; with `trans`,
// row and column change places.
DEV void ldmatrix_x4(uint32_t (&r)[4], const void* row, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                      : "r"(shared_address(row))
                      : "memory");)
  ON_SIM(const uint32_t address = shared_address(row, at); sim::ldmatrix(r, &address, 1, false, at);)
}
DEV void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                      : "r"(shared_address(row))
                      : "memory");)
  ON_SIM(const uint32_t address = shared_address(row, at); sim::ldmatrix(r, &address, 1, true, at);)
}
DEV void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3,
                     [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                      : "memory");)
  ON_SIM(const uint32_t r[4] = {r0, r1, r2, r3}; const uint32_t address = shared_address(row, at);
         sim::stmatrix(r, &address, 1, false, at);)
}
DEV void stmatrix_x4_trans(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3,
                           [[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                      : "memory");)
  ON_SIM(const uint32_t r[4] = {r0, r1, r2, r3}; const uint32_t address = shared_address(row, at);
         sim::stmatrix(r, &address, 1, true, at);)
}

// Two floats to a packed bf16 pair, `low` in the low half, rounded to nearest even.
DEV uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return sim::bf16_round(low) | static_cast<uint32_t>(sim::bf16_round(high)) << 16;
#endif
}

}  // namespace ROUTEGRAD_VARIANT
