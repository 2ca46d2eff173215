// What the kernels for Hopper copy, and nothing else: no arithmetic, no exchange between blocks.
// hopper_copies.py runs it.
//
// WIDE tensors of four streams (x, g) and SINGLES of one (f, dl) come in and stay for `stay` clocks. With
// SINGLES a tensor of four streams leaves, and always one of one.
#include "exchange.cuh"

constexpr int WIDE = MHC_WIDE, SINGLES = MHC_SINGLES;
constexpr int STAGE = (STREAMS * WIDE + SINGLES) * REGION;
static_assert(STAGES * STAGE == MHC_SHARED, "hopper_copies.py lays out otherwise");

extern "C" __global__ void __launch_bounds__(MHC_THREADS, 1)
    hopper_copies(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap g,
                  const __grid_constant__ TensorMap f, const __grid_constant__ TensorMap dl,
                  const __grid_constant__ TensorMap streams_out, const __grid_constant__ TensorMap out,
                  u32* tickets, int T, int groups, int stay) {
    DYNAMIC_SHARED(memory);
    SHARED_ARRAY(u64, full, STAGES);
    SHARED_ARRAY(u64, noted, STAGES);
    SHARED_ARRAY(u64, empty, STAGES);
    SHARED_ARRAY(long long, came, STAGES);
    const u32 base = shared_address(memory), fulls = shared_address(full), notes = shared_address(noted);
    const u32 empties = shared_address(empty);
    const Place at = take_place(tickets, T, groups);
    if (threadIdx.x == 0)
        for (int s = 0; s < STAGES; s++)
            barrier_init(fulls + 8 * s, 1), barrier_init(notes + 8 * s, 1), barrier_init(empties + 8 * s, 1);
    fence_copies();
    __syncthreads();
    if (threadIdx.x % 32) return;
    const u64 policy = evict_first();
    for (int it = 0; it < at.tiles; it++) {
        const int stage = it % STAGES, token = (at.group + it * groups) * TILE, phase = it / STAGES & 1;
        const u32 tile = base + stage * STAGE, bar = fulls + 8 * stage;
        if (threadIdx.x == 0) {
            if (it >= STAGES) barrier_wait(empties + 8 * stage, phase ^ 1);
            barrier_expect(bar, STAGE);
            load_boxes<STREAMS>(tile, x, at.first_channel, 0, token, bar, policy);
            if (WIDE > 1)
                load_boxes<STREAMS>(tile + STREAMS * REGION, g, at.first_channel, 0, token, bar, policy);
            if (SINGLES)
                load_boxes<1>(tile + STREAMS * WIDE * REGION, f, at.first_channel, 0, token, bar, policy);
            if (SINGLES > 1)
                load_boxes<1>(tile + (STREAMS * WIDE + 1) * REGION, dl, at.first_channel, 0, token, bar,
                              policy);
        } else if (threadIdx.x == 32) {
            barrier_wait(bar, phase);
            came[stage] = clock64();
            barrier_arrive(notes + 8 * stage);
        } else {
            barrier_wait(notes + 8 * stage, phase);
            barrier_wait(bar, phase);
            while (clock64() - *(volatile long long*)(came + stage) < stay) {
            }
            if (SINGLES) store_boxes<STREAMS>(streams_out, at.first_channel, 0, token, tile);
            store_boxes<1>(out, at.first_channel, 0, token, tile);
            await_stored();
            barrier_arrive(empties + 8 * stage);
        }
    }
}
