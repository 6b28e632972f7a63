// Every instruction below C++: inline PTX for the GPU beside the simulator call that has the same meaning.
// Inline assembly stands in the ptx_*.cuh files and nowhere else.
#pragma once
#include "ptx_copy.cuh"   // TMA loads and stores, multicast, cp.async, ldmatrix, stmatrix
#include "ptx_math.cuh"   // powers of two
#include "ptx_mma.cuh"    // matrix products of a warp, from registers
#include "ptx_sync.cuh"   // barriers, mbarriers, clusters, fences, register allotment
#include "ptx_wgmma.cuh"  // warpgroup matrix products and their descriptors
