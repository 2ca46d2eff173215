// What a kernel is compiled for (compile.py passes MHC_*), and how a tile lies in shared memory.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

constexpr int STREAMS = 4;
constexpr int ROWS = 24;                 // of phi: pre 4, post 4, res 16
constexpr int CHANNELS = MHC_CHANNELS;   // of a stream
constexpr int WIDTH = MHC_WIDTH;         // channels of a slice, which is a block's; the last may have fewer
constexpr int SLICES = MHC_SLICES;       // of a row, the blocks of a group
constexpr int TILE = MHC_TILE;           // tokens
constexpr int STAGES = MHC_STAGES;       // tiles in a block's shared memory
constexpr bool PREVIOUS = MHC_PREVIOUS;  // the streams are read with another connection's weights
constexpr u32 ALL_LANES = 0xffffffffu;

// The TMA copies a tile box by box. A row of a box has 128 bytes, one token's.
constexpr int BOX = MHC_BOX;  // channels
constexpr int BOXES = WIDTH / BOX;
constexpr int BOX_BYTES = TILE * BOX * 2;
constexpr int REGION = BOXES * BOX_BYTES;  // a slice of one stream
static_assert(BOX * 2 == 128, "a box is as wide as the swizzle");
static_assert((SLICES - 1) * WIDTH < CHANNELS && CHANNELS <= SLICES * WIDTH, "slices cover the channels");

// Whether to plant the fault `name`: the emulator's tests do (tests/ops/test_hopper_orders.py), a GPU
// never.
#ifndef BUG
#define BUG(name) false
#endif

// The address of channels 8 * chunk to 8 * chunk + 7 in the row at `row`. The TMA swizzles: it permutes the
// sixteen-byte chunks of a row by bits 7 to 9 of the address, so that eight consecutive rows lie in different
// banks.
__device__ __forceinline__ u32 place(u32 row, u32 chunk) {
    row += chunk / 8 * BOX_BYTES;
    return row + (BUG(unswizzled) ? chunk % 8 << 4 : (chunk % 8 ^ row >> 7 & 7) << 4);
}
