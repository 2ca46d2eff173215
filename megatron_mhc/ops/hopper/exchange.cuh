// How blocks share the work and add up over whole rows.
//
// A group of SLICES thread blocks works through tiles of TILE tokens. Block `slice` of the group owns WIDTH
// channels of all four streams: it loads them into shared memory once and keeps them there while the group
// sums over whole rows through global memory. Waiting cannot deadlock: blocks take tickets as they start,
// SLICES consecutive tickets make a group, and a block waits only for blocks of its own group or of earlier
// ones. So a kernel ends if SLICES blocks fit on the GPU at once, whatever else runs there.
#pragma once

#include "device.cuh"
#include "shape.cuh"

// Slots of the rings in global memory: pre.cu says why a slot is free when it comes round again.
constexpr int EXCHANGE = BUG(one_slot) ? 1 : MHC_EXCHANGE;
static_assert(MHC_EXCHANGE == 2 * STAGES,
              "a block may be STAGES tiles ahead of one that is STAGES tiles ahead of it");

// ---- who does what ----

struct Place {
    int group, slice, first_channel, width, tiles;  // tiles: of this group
};

// Takes a ticket. All threads of a block call it.
__device__ __forceinline__ Place take_place(u32* tickets, int T, int groups) {
    SHARED_VARIABLE(u32, ticket);
    if (threadIdx.x == 0) ticket = atomicAdd(tickets, 1u);
    __syncthreads();
    Place p;
    p.group = ticket / SLICES;
    p.slice = ticket % SLICES;
    p.first_channel = p.slice * WIDTH;
    p.width = min(WIDTH, CHANNELS - p.first_channel);
    p.tiles = ((T + TILE - 1) / TILE - p.group + groups - 1) / groups;
    return p;
}
// The first token of the group's tile `it` whose coefficients this slice computes: those of every SLICES-th.
__device__ __forceinline__ int own_token(const Place& p, int it) {
    int r = (p.slice - (TILE * it) % SLICES) % SLICES;
    return r < 0 ? r + SLICES : r;
}

// ---- sums over slices ----
//
// Blocks exchange atoms of three numbers and a tag. A reader repeats its load until it finds its tile's tag.
// Memory starts as zeros, tags start at 1.

// Waits until all slices have put the atom at p + s * stride. It polls slice `first` alone until that is
// there, so that a warp asks for one sector most of the time. A tile's other atoms come at about the same
// time; who reads them checks their tags.
__device__ __forceinline__ void await_slices(const float* p, int first, int stride, u32 tag, int lane) {
    while (get(p + first * stride).tag != tag) {
    }
    for (int s = lane; s < SLICES; s += 32)
        while (get(p + s * stride).tag != tag) {
        }
    __syncwarp();
}
// Loads K atoms at p + offset until all have the tag. The loads are independent, so their latencies overlap.
template <int K>
__device__ __forceinline__ void get_all(Tagged (&v)[K], const float* p, const int (&offset)[K], u32 tag) {
    bool missing;
    do {
#pragma unroll
        for (int k = 0; k < K; k++) v[k] = get(p + offset[k]);
        missing = false;
#pragma unroll
        for (int k = 0; k < K; k++) missing |= v[k].tag != tag;
    } while (missing);
}
// Sums slices first, first + STEP, ..., in this order. Each lane loads MANY slices a round, at offsets known
// at compile time. Loads past the last slice return stale data or zeros (AHEAD of compile.py) and are
// ignored.
template <int STEP, int MANY>
__device__ __forceinline__ float3 sum_slices(const float* p, int first, int stride, u32 tag) {
    float3 total = make_float3(0.f, 0.f, 0.f);
#pragma unroll 1
    for (int s = first; s < SLICES; s += STEP * MANY) {
        Tagged v[MANY];
        bool missing;
        do {
            missing = false;
#pragma unroll
            for (int k = 0; k < MANY; k++) v[k] = get(p + s * stride + k * STEP * stride);
#pragma unroll
            for (int k = 0; k < MANY; k++) missing |= s + k * STEP < SLICES && v[k].tag != tag;
        } while (missing);
#pragma unroll
        for (int k = 0; k < MANY; k++)
            if (s + k * STEP < SLICES) total.x += v[k].x, total.y += v[k].y, total.z += v[k].z;
    }
    return total;
}
__device__ __forceinline__ float3 add(float3 a, float3 b) {
    return make_float3(a.x + b.x, a.y + b.y, a.z + b.z);
}
// Adds the values of lanes `even` and `odd`: every lane gets the same bits.
__device__ __forceinline__ float3 add_lanes(float3 v, int even, int odd) {
    return make_float3(__shfl_sync(ALL_LANES, v.x, even) + __shfl_sync(ALL_LANES, v.x, odd),
                       __shfl_sync(ALL_LANES, v.y, even) + __shfl_sync(ALL_LANES, v.y, odd),
                       __shfl_sync(ALL_LANES, v.z, even) + __shfl_sync(ALL_LANES, v.z, odd));
}
// Adds the values of lanes 8 apart: they all get the same bits.
__device__ __forceinline__ float3 sum_quarters(float3 v) {
#pragma unroll
    for (int step = 8; step < 32; step *= 2)
        v = add(v, make_float3(__shfl_xor_sync(ALL_LANES, v.x, step), __shfl_xor_sync(ALL_LANES, v.y, step),
                               __shfl_xor_sync(ALL_LANES, v.z, step)));
    return v;
}
// Lane l holds numbers 3 l to 3 l + 2: every lane gets number k.
__device__ __forceinline__ float pick(float3 v, int k) {
    const float x = __shfl_sync(ALL_LANES, v.x, k / 3), y = __shfl_sync(ALL_LANES, v.y, k / 3);
    const float z = __shfl_sync(ALL_LANES, v.z, k / 3);
    return k % 3 == 0 ? x : k % 3 == 1 ? y : z;
}
