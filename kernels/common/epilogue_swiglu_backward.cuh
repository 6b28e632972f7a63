// Epilogue of dA' = dout W, the gradient of an expert's hidden units before the gate w_r of the row: reads
// h = (gate, up) and assigns
//   A = silu(gate) ⊙ up                     from h as stored; not written
//   scaled_a = bf16(w_r A)                  for the gradient of the down projection's weight
//   dh = bf16(w_r dA' ⊙ (up silu'(gate)))   over gate; bf16(w_r dA' ⊙ silu(gate)) over up
//   dots[r, c] = Σ dA' A                    over the columns of tile c: the parts of the gate's gradient
// Order of a dot: a thread's columns ascending, then over the four lanes of a row (1, 2).
#pragma once
#include "epilogue_store_bf16.cuh"
#include "row_gates.cuh"
#include "swiglu.cuh"

namespace ROUTEGRAD_VARIANT {

// Pieces of h come by TMA into one of two sets of buffers, are replaced there by dh, and leave by TMA beside scaled_a.
// The next piece is fetched while one is computed.
class LoadingPort : public WarpgroupPort {
 public:
  enum Buffer { kGate, kUp, kScaledA, kPieceBuffers };
  static constexpr int kBuffers = 2 * kPieceBuffers;
  struct Buffers {
    alignas(1024) uint8_t bytes[2][kPieceBuffers][kStagingBytes];
  };
  DEV LoadingPort(Buffers& buffers, uint64_t* full, int warpgroup)
      : WarpgroupPort(warpgroup), buffers_(buffers), full_(full) {}

  // Asks for the next piece. Its set was last used two pieces ago; those stores must have been read by now.
  DEV void fetch(const TensorMap& h, int column, int row) {
    const int set = fetched_++ & 1;
    if (!issuer()) return;
    bulk_wait_read<0>();
    mbar_expect_tx(&full_[set], 2 * kStagingBytes);
    tma_load_3d(buffers_.bytes[set][kGate], &h, &full_[set], column, 0, row);
    tma_load_3d(buffers_.bytes[set][kUp], &h, &full_[set], column, 1, row);
  }
  // The buffers of the piece asked for before the last, once it is there.
  DEV uint8_t (&arrived())[kPieceBuffers][kStagingBytes] {
    mbar_wait(&full_[taken_ & 1], taken_ >> 1 & 1);
    return buffers_.bytes[taken_++ & 1];
  }

 private:
  Buffers& buffers_;
  uint64_t* full_;
  uint32_t fetched_ = 0, taken_ = 0;  // pieces
};

struct SwigluBackward {
  using Port = LoadingPort;
  static constexpr bool kGateUp = false, kPrefetch = true;
  TensorMap h;          // [R, 2, F], as dh
  Bf16Output dh;        // [R, 2, F]
  Bf16Output scaled_a;  // [R, F]
  float* dots;          // [R, dot_columns]
  int dot_columns;
  RowGates gates;

  DEV void prefetch(const Fragment& at, LoadingPort& port) const { port.fetch(h, at.first_column, at.first_row); }

  template <int COLUMNS>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, LoadingPort& port) const {
    float w[2], dot[2] = {0, 0};
    gates.look_up(w, at);
    pieces<COLUMNS, 0>(d, at, port, w, dot);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      dot[h] += __shfl_xor_sync(~0u, dot[h], 1);
      dot[h] += __shfl_xor_sync(~0u, dot[h], 2);
      if (threadIdx.x % 4 == 0 && at.local_row(h) < at.rows)
        st_global(dots + static_cast<int64_t>(at.row(h)) * dot_columns + at.first_column / COLUMNS, dot[h]);
    }
  }

 private:
  template <int COLUMNS, int FIRST>
  DEV void pieces(const float (&d)[COLUMNS / 2], const Fragment& at, LoadingPort& port, const float (&w)[2],
                  float (&dot)[2]) const {
    constexpr int kPiece = piece_columns(COLUMNS, FIRST);
    const int column = at.first_column + FIRST;
    if (column >= scaled_a.width) return;
    auto& buffers = port.arrived();
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kPiece / 8; j += 2) {
      if (j == 2) fetch_after<COLUMNS, FIRST>(at, port);  // by now the last piece's stores have been read
      const int place = Staging::byte(warp * 16 + lane % 16, j + lane / 16);
      // Four 8 x 8 matrices, as the accumulators have them: (j, h) = (0, 0), (0, 1), (1, 0), (1, 1).
      uint32_t gate[4], up[4], scaled[4];
      ldmatrix_x4(gate, buffers[LoadingPort::kGate] + place);
      ldmatrix_x4(up, buffers[LoadingPort::kUp] + place);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = i % 2;
        const float* da = d + FIRST / 2 + 4 * (j + i / 2) + 2 * h;
        const Swiglu low(low_bf16(gate[i])), high(high_bf16(gate[i]));
        const float up_low = low_bf16(up[i]), up_high = high_bf16(up[i]);
        const float a_low = low.silu * up_low, a_high = high.silu * up_high;
        const float da_low = w[h] * da[0], da_high = w[h] * da[1];
        dot[h] += da[0] * a_low;
        dot[h] += da[1] * a_high;
        gate[i] = pack_bf16(da_low * up_low * low.slope, da_high * up_high * high.slope);
        up[i] = pack_bf16(da_low * low.silu, da_high * high.silu);
        scaled[i] = pack_bf16(w[h] * a_low, w[h] * a_high);
      }
      stmatrix_x4(buffers[LoadingPort::kGate] + place, gate[0], gate[1], gate[2], gate[3]);
      stmatrix_x4(buffers[LoadingPort::kUp] + place, up[0], up[1], up[2], up[3]);
      stmatrix_x4(buffers[LoadingPort::kScaledA] + place, scaled[0], scaled[1], scaled[2], scaled[3]);
    }
    port.publish();
    if (Bf16Output::leaves_by_tma<kPiece>(at)) {
      if (port.issuer()) {
        tma_store_3d(&dh.map, buffers[LoadingPort::kGate], column, 0, at.first_row);
        tma_store_3d(&dh.map, buffers[LoadingPort::kUp], column, 1, at.first_row);
        tma_store_3d(&scaled_a.map, buffers[LoadingPort::kScaledA], column, 0, at.first_row);
      }
    } else {
      dh.copy_out<kPiece>(buffers[LoadingPort::kGate], at, column, 0);
      dh.copy_out<kPiece>(buffers[LoadingPort::kUp], at, column, 1);
      scaled_a.copy_out<kPiece>(buffers[LoadingPort::kScaledA], at, column, 0);
      port.barrier();  // before the next fetch writes there
    }
    port.commit();
    if constexpr (FIRST + 64 < COLUMNS) pieces<COLUMNS, FIRST + 64>(d, at, port, w, dot);
  }

  // Asks for the piece after this one: of the same rows, or the first of the tile's next 64.
  template <int COLUMNS, int FIRST>
  DEV void fetch_after(const Fragment& at, LoadingPort& port) const {
    const int column = at.first_column + FIRST + 64;
    if (FIRST + 64 < COLUMNS && column < scaled_a.width)
      port.fetch(h, column, at.first_row);
    else if (at.more)
      port.fetch(h, at.first_column, at.first_row + 64);
  }
};

}  // namespace ROUTEGRAD_VARIANT
