// With MIX, `pre` reads what post_res makes of x and f.
#pragma once

#include "device.cuh"
#include "shape.cuh"

// Writes x' of four channels of a token over its x. h: the token's h_post, then H_res; here: where the
// channels lie in every region.
__device__ __forceinline__ void mix(unsigned char* tile, const unsigned char* f, const float* h, u32 here,
                                    uint2 added) {
    const uint2 fv = *(const uint2*)(f + here);
    const u32 f0 = pack(low_half(fv.x) + low_half(added.x), high_half(fv.x) + high_half(added.x));
    const u32 f1 = pack(low_half(fv.y) + low_half(added.y), high_half(fv.y) + high_half(added.y));
    uint2 v[STREAMS];
#pragma unroll
    for (int j = 0; j < STREAMS; j++) v[j] = *(const uint2*)(tile + j * REGION + here);
    const float4 write = *(const float4*)h;
    const float writes[STREAMS] = {write.x, write.y, write.z, write.w};
#pragma unroll
    for (int i = 0; i < STREAMS; i++) {
        const float4 row = *(const float4*)(h + STREAMS + i * STREAMS);
        const float mixing[STREAMS] = {row.x, row.y, row.z, row.w};
        // The order of post_res.mixed, whose bits these are.
        float a0 = __fmul_rn(writes[i], low_half(f0)), a1 = __fmul_rn(writes[i], high_half(f0));
        float a2 = __fmul_rn(writes[i], low_half(f1)), a3 = __fmul_rn(writes[i], high_half(f1));
#pragma unroll
        for (int j = 0; j < STREAMS; j++) {
            a0 = __fmaf_rn(mixing[j], low_half(v[j].x), a0), a1 = __fmaf_rn(mixing[j], high_half(v[j].x), a1);
            a2 = __fmaf_rn(mixing[j], low_half(v[j].y), a2), a3 = __fmaf_rn(mixing[j], high_half(v[j].y), a3);
        }
        *(uint2*)(tile + i * REGION + here) = make_uint2(pack(a0, a1), pack(a2, a3));
    }
}
