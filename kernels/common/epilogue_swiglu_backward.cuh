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
  DEV uint8_t (&arrived(const Fragment&, int /*column*/))[kPieceBuffers][kStagingBytes] {
    mbar_wait(&full_[taken_ & 1], taken_ >> 1 & 1);
    return buffers_.bytes[taken_++ & 1];
  }

 private:
  Buffers& buffers_;
  uint64_t* full_;
  uint32_t fetched_ = 0, taken_ = 0;  // pieces
};

// The same without TMA: one set of buffers, filled by cp.async when the piece is needed.
class MmaLoadingPort : public MmaPort {
 public:
  using Buffer = LoadingPort::Buffer;
  struct Buffers {
    alignas(1024) uint8_t bytes[LoadingPort::kPieceBuffers][kStagingBytes];
  };
  DEV MmaLoadingPort(Buffers& buffers, int warpgroup) : MmaPort(warpgroup), buffers_(buffers) {}

  DEV void set_source(const bf16* h, int width) { h_ = h, width_ = width; }
  DEV void fetch(const TensorMap&, int, int) {}
  DEV uint8_t (&arrived(const Fragment& at, int column))[LoadingPort::kPieceBuffers][kStagingBytes] {
    const int chunk = threadIdx.x % 8, first = column + chunk * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.x % 128 / 8 + 16 * i;
      const bool valid = row < at.rows && first < width_;
      const bf16* const gate = h_ + (valid ? int64_t{at.first_row + row} * 2 * width_ + first : 0);
      cp_async_16(buffers_.bytes[LoadingPort::kGate] + staging_byte(row, chunk), gate, valid ? 16 : 0);
      cp_async_16(buffers_.bytes[LoadingPort::kUp] + staging_byte(row, chunk), valid ? gate + width_ : gate, valid ? 16 : 0);
    }
    cp_async_commit();
    cp_async_wait<0>();
    barrier();
    return buffers_.bytes;
  }
  DEV void put(uint8_t* buffer, int j, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) const {
    __syncwarp();  // the other lanes' ldmatrix has read what is overwritten
    MmaPort::put(buffer, j, m0, m1, m2, m3);
  }

 private:
  Buffers& buffers_;
  const bf16* h_ = nullptr;  // [R, 2, width]
  int width_ = 0;
};

struct SwigluBackward {
  using Port = LoadingPort;
  static constexpr bool kGateUp = false, kPrefetch = true, kForMma = false;
  TensorMap h;          // [R, 2, F], as dh
  Bf16Output dh;        // [R, 2, F]
  Bf16Output scaled_a;  // [R, F]
  float* dots;          // [R, dot_columns]
  int dot_columns;
  RowGates gates;

  DEV void prefetch(const Fragment& at, LoadingPort& port) const { port.fetch(h, at.first_column, at.first_row); }

  template <int COLUMNS, class Port>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Port& port) const {
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
  template <int COLUMNS, int FIRST, class Port>
  DEV void pieces(const float (&d)[COLUMNS / 2], const Fragment& at, Port& port, const float (&w)[2],
                  float (&dot)[2]) const {
    constexpr int kPiece = piece_columns(COLUMNS, FIRST);
    const int column = at.first_column + FIRST;
    if (column >= scaled_a.width) return;
    auto& buffers = port.arrived(at, column);
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kPiece / 8; j += 2) {
      if (j == 2) fetch_after<COLUMNS, FIRST>(at, port);  // by now the last piece's stores have been read
      const int place = staging_byte(warp * 16 + lane % 16, j + lane / 16);
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
      port.put(buffers[LoadingPort::kGate], j, gate[0], gate[1], gate[2], gate[3]);
      port.put(buffers[LoadingPort::kUp], j, up[0], up[1], up[2], up[3]);
      port.put(buffers[LoadingPort::kScaledA], j, scaled[0], scaled[1], scaled[2], scaled[3]);
    }
    port.publish();
    store_piece<kPiece>(buffers, at, column, port);
    port.commit();
    if constexpr (FIRST + 64 < COLUMNS) pieces<COLUMNS, FIRST + 64>(d, at, port, w, dot);
  }

  template <int PIECE, class Port>
  DEV void store_piece(uint8_t (&buffers)[LoadingPort::kPieceBuffers][kStagingBytes], const Fragment& at, int column,
                       Port& port) const {
    if constexpr (Port::kTma)
      if (Bf16Output::leaves_by_tma<PIECE>(at)) {
        if (port.issuer()) {
          tma_store_3d(&dh.map, buffers[LoadingPort::kGate], column, 0, at.first_row);
          tma_store_3d(&dh.map, buffers[LoadingPort::kUp], column, 1, at.first_row);
          tma_store_3d(&scaled_a.map, buffers[LoadingPort::kScaledA], column, 0, at.first_row);
        }
        return;
      }
    dh.copy_out<PIECE>(buffers[LoadingPort::kGate], at, column, 0);
    dh.copy_out<PIECE>(buffers[LoadingPort::kUp], at, column, 1);
    scaled_a.copy_out<PIECE>(buffers[LoadingPort::kScaledA], at, column, 0);
    port.barrier();  // before the next fetch writes there
  }

  // Asks for the piece after this one: of the same rows, or the first of the tile's next 64.
  template <int COLUMNS, int FIRST, class Port>
  DEV void fetch_after(const Fragment& at, Port& port) const {
    const int column = at.first_column + FIRST + 64;
    if (FIRST + 64 < COLUMNS && column < scaled_a.width)
      port.fetch(h, column, at.first_row);
    else if (at.more)
      port.fetch(h, at.first_column, at.first_row + 64);
  }
};

struct MmaSwigluBackward : SwigluBackward {
  using MmaPort = MmaLoadingPort;
  const bf16* h_data;  // as dh

  template <int COLUMNS>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, MmaLoadingPort& port) const {
    port.set_source(h_data, scaled_a.width);
    SwigluBackward::store<COLUMNS>(d, at, port);
  }
};

}  // namespace ROUTEGRAD_VARIANT
