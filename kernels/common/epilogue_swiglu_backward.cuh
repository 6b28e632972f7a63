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

// Pieces of h come by TMA into one of the sets of buffers, are replaced there by dh, and leave by TMA beside scaled_a. A
// piece's computation is short beside the latencies of a load and a store, so pieces are small and sets many: the first
// kSets pieces of a tile are fetched before its products, as are the gates of its rows, and while a piece is computed the
// kSets - 1 after it are on their way.
class LoadingPort : public WarpgroupPort {
 public:
  static constexpr int kBox = 32, kSets = 4;  // columns of a piece
  enum Buffer { kGate, kUp, kScaledA, kPieceBuffers };
  struct Buffers {
    alignas(1024) uint8_t bytes[kSets][kPieceBuffers][64 * kBox * 2];
  };
  DEV LoadingPort(Buffers& buffers, uint64_t* full, int warpgroup)
      : WarpgroupPort(warpgroup), buffers_(buffers), full_(full) {}

  // Asks for the next piece, unless all sets have one. The set's last stores must have been read by now.
  DEV void fetch(const TensorMap& h, int column, int row) {
    if (fetched_ - done_ == kSets) return;
    const uint32_t set = fetched_++ % kSets;
    if (!issuer()) return;
    bulk_wait_read<0>();
    mbar_expect_tx(&full_[set], 2 * sizeof buffers_.bytes[set][kGate]);
    tma_load_3d(buffers_.bytes[set][kGate], &h, &full_[set], column, 0, row);
    tma_load_3d(buffers_.bytes[set][kUp], &h, &full_[set], column, 1, row);
  }
  // The buffers of the next piece, once it is there.
  DEV auto& arrived(const Fragment&, int /*column*/) {
    forget_origin(done_);  // else the addresses of a set are kept in registers until its next turn
    mbar_wait(&full_[done_ % kSets], done_ / kSets & 1);
    return buffers_.bytes[done_ % kSets];
  }
  DEV void put(uint8_t* buffer, int j, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) const {
    WarpgroupPort::put<kBox>(buffer, j, m0, m1, m2, m3);
  }
  // Ends a piece.
  DEV void commit() {
    WarpgroupPort::commit();
    ++done_;
  }

  // As RowGates::of_lane has them: the gates of a tile's first fragment in lanes 0 to 15, of the next in the others; and then
  // of each in turn in lanes 0 to 15.
  DEV void keep_gates(float gate) { gate_ = gate; }
  DEV float gate(const RowGates&, const Fragment&) {
    const float gate = gate_;
    gate_ = __shfl_xor_sync(~0u, gate, 16);
    return gate;
  }

 private:
  Buffers& buffers_;
  uint64_t* full_;
  uint32_t fetched_ = 0, done_ = 0;  // pieces
  float gate_ = 0;
};

// The same without TMA: one set of buffers, filled by cp.async when the piece is needed.
class MmaLoadingPort : public MmaPort {
 public:
  static constexpr int kBox = 64;
  using Buffer = LoadingPort::Buffer;
  struct Buffers {
    alignas(1024) uint8_t bytes[LoadingPort::kPieceBuffers][kStagingBytes];
  };
  DEV MmaLoadingPort(Buffers& buffers, int warpgroup) : MmaPort(warpgroup), buffers_(buffers) {}

  DEV void set_source(const bf16* h, int width) { h_ = h, width_ = width; }
  DEV float gate(const RowGates& gates, const Fragment& at) { return threadIdx.x % 32 < 16 ? gates.of_lane(at) : 0; }
  DEV auto& arrived(const Fragment& at, int column) {
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

  template <int COLUMNS>
  DEV void prefetch(const Tile& tile, int first, bool more, LoadingPort& port) const {
    const Fragment at(tile, first, more);
#pragma unroll
    for (int set = 0; set < LoadingPort::kSets; ++set) fetch<COLUMNS>(at, port, set);
    port.keep_gates(gates.of_lane(Fragment(tile, first + threadIdx.x % 32 / 16, false)));
  }

  template <int COLUMNS, class Port>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Port& port) const {
    float w[2], dot[2] = {0, 0};
    RowGates::spread(w, port.gate(gates, at));
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
    constexpr int kPiece = piece_columns(COLUMNS, FIRST, Port::kBox);
    const int column = at.first_column + FIRST;
    if (column >= scaled_a.width) return;
    auto& buffers = port.arrived(at, column);
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kPiece / 8; j += 2) {
      if constexpr (Port::kTma)  // by now the last piece's stores have been read
        if (j + 2 >= kPiece / 8) fetch<COLUMNS>(at, port, FIRST / Port::kBox + Port::kSets - 1);
      const int place = staging_byte<Port::kBox>(warp * 16 + lane % 16, j + lane / 16);
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
    if constexpr (FIRST + kPiece < COLUMNS) pieces<COLUMNS, FIRST + kPiece>(d, at, port, w, dot);
  }

  template <int PIECE, class Port, class Buffers>
  DEV void store_piece(const Buffers& buffers, const Fragment& at, int column, Port& port) const {
    constexpr int kBox = Port::kBox;
    if constexpr (Port::kTma)
      if (Bf16Output::leaves_by_tma<PIECE, kBox>(at)) {
        if (port.issuer()) {
          tma_store_3d(&dh.map, buffers[LoadingPort::kGate], column, 0, at.first_row);
          tma_store_3d(&dh.map, buffers[LoadingPort::kUp], column, 1, at.first_row);
          tma_store_3d(&scaled_a.map, buffers[LoadingPort::kScaledA], column, 0, at.first_row);
        }
        return;
      }
    dh.copy_out<PIECE, kBox>(buffers[LoadingPort::kGate], at, column, 0);
    dh.copy_out<PIECE, kBox>(buffers[LoadingPort::kUp], at, column, 1);
    scaled_a.copy_out<PIECE, kBox>(buffers[LoadingPort::kScaledA], at, column, 0);
    port.barrier();  // before the next fetch writes there, where a fragment has more pieces than there are sets
  }

  // Asks for a piece by its number: of the fragment or, past its last, of the next one, if there is one.
  template <int COLUMNS>
  DEV void fetch(const Fragment& at, LoadingPort& port, int piece) const {
    const int left = scaled_a.width - at.first_column;
    const int pieces = ceil_div(left < COLUMNS ? left : COLUMNS, LoadingPort::kBox);
    const bool next = piece >= pieces;
    if (next) piece -= pieces;
    if (piece < pieces && (!next || at.more))
      port.fetch(h, at.first_column + piece * LoadingPort::kBox, at.first_row + 64 * next);
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
