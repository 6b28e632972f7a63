// The simulator as kernels see it (through common/simt.cuh and ptx_*.cuh): one function per instruction. What each one
// checks is told in README.md here; a failed check ends the launch with a text that names the thread and source line.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <source_location>
#include <string>

#include "../routegrad.h"
#include "cuda_language.hpp"

namespace sim {

using Where = std::source_location;
using language::dim3;

// Ends the launch: the running block's fault.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const std::string& what, Where at);  // with the line of the kernel

// ---- launch
struct LaunchShape {
  dim3 grid;
  uint32_t threads;  // per block
  size_t shared;     // dynamic shared memory, bytes
  uint32_t cluster;  // blocks of a cluster, along grid.x
};
routegrad_status launch(const LaunchShape& shape, void (*body)(void*), void* captured);
int multiprocessors();
int architecture();     // 10 · major + minor of the compute capability
uint32_t max_shared();  // bytes of dynamic shared memory that a block may ask for

// ---- shared memory
void* dynamic_shared(size_t alignment, size_t bytes);
uint32_t shared_address(const void* p, Where at);

// ---- counters of global memory traffic
void count_read(size_t bytes);
void count_written(size_t bytes);

// ---- threads of a block and of a warp
void named_barrier(int id, int threads, bool wait, Where at);  // threads 0: all of the block
enum class Collective : int { Sync, Shuffle, Ballot, Work };
// Every lane of `mask` calls it. Shuffle returns the value of lane `source`, Ballot the lanes whose value is odd.
uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, int source, Where at);
int lane();
void setmaxnreg(int registers, bool increase, Where at);

// ---- fences and clusters
void fence_proxy_async(Where at);
void fence_mbar_init(Where at);
uint32_t cluster_rank();
void cluster_arrive(Where at);
void cluster_wait(Where at);

// ---- mbarriers
void mbar_init(uint32_t bar, uint32_t count, Where at);
void mbar_arrive(uint32_t bar, Where at);
void mbar_expect_tx(uint32_t bar, uint32_t bytes, Where at);
void mbar_arrive_remote(uint32_t bar, uint32_t rank, Where at);
void mbar_wait(uint32_t bar, uint32_t parity, Where at);

// ---- TMA
struct alignas(128) TensorMap {  // size and alignment of a CUtensorMap
  uint64_t magic;
  char* base;
  uint64_t extent[5];
  uint64_t stride[5];  // bytes; stride[0] is the element
  uint16_t box[5];
  uint8_t rank;
  uint8_t element;    // bytes
  uint16_t swizzle;   // span in bytes, 0 for none
};
static_assert(sizeof(TensorMap) == 128);
using Coordinates = std::initializer_list<int>;
// False when the descriptor is invalid; describe_failure() says why.
bool encode_tensor_map(TensorMap* map, const void* base, int rank, uint32_t element, const uint64_t* extent,
                       const uint64_t* stride_bytes, const uint32_t* box, uint32_t swizzle);
void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, Coordinates at_box, Where at);
void tma_load_multicast(uint32_t dst, const TensorMap* map, uint32_t bar, Coordinates at_box, uint16_t blocks, Where at);
void tma_store(const TensorMap* map, uint32_t src, Coordinates at_box, Where at);
void tma_reduce_add(const TensorMap* map, uint32_t src, Coordinates at_box, Where at);
void bulk_commit();
void bulk_wait(int keep, bool read_only, Where at);

// ---- cp.async
void cp_async_16(uint32_t dst, const void* src, uint32_t valid, Where at);
void cp_async_commit();
void cp_async_wait(int keep, Where at);
void cp_async_mbar_arrive_noinc(uint32_t bar, Where at);

// ---- warp_matrix.cpp: `count` instructions ldmatrix or stmatrix of four matrices, and `tiles` of mma.sync that share A
void ldmatrix(uint32_t* registers, const uint32_t* rows, int count, bool transpose, Where at);
void stmatrix(const uint32_t* registers, const uint32_t* rows, int count, bool transpose, Where at);
void mma_row(float* d, const uint32_t* a, const uint32_t* b, int tiles, Where at);

// ---- wgmma
struct Operand {
  uint64_t descriptor;
  bool mn_major;
  bool operator==(const Operand&) const = default;
};
void wgmma_fence(Where at);
void wgmma(float* d, int columns, Operand a, Operand b, bool accumulate, Where at);
void wgmma_a_registers(float* d, int columns, const uint32_t* a, Operand b, bool accumulate, Where at);
void wgmma_commit(Where at);
void wgmma_wait(int keep, Where at);
void wgmma_take(float* d, int registers, Where at);

// Float to bf16 bits: nearest, ties to even, NaN to 0x7fff.
inline uint16_t bf16_round(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace sim
