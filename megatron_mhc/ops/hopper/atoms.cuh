// How the numbers of a token lie in what a slice tells its group, and what `finish` makes of them.
#pragma once

#include "gram.cuh"

constexpr int LOADS = MHC_LOADS;  // slices that a lane loads a round
// The same with NORM, of a token's first four atoms and of the fifth.
constexpr int QUAD_LOADS = MHC_QUAD_LOADS, FIFTH_LOADS = MHC_FIFTH_LOADS;
static_assert(QUAD_LOADS % 2 == 0, "even and odd slices are summed apart");
constexpr int FINISHING = MHC_FINISHING;  // warps, in pairs
constexpr int ATOMS = MHC_ATOMS;          // that hold a token's 25 or 34 numbers
constexpr int PART = MHC_PART;            // floats of a slice's share of a tile's sums
static_assert(PART == TILE * ATOMS * 4, "an atom has four words");

// Where an atom of a token is in a part: first the READ atoms that h_pre is made of, of all tokens; then
// every token's rest. A macro, since as a function it makes registers spill at some widths. With NORM they
// are five (gram.cuh), of which the fifth stands behind the others of all tokens.
constexpr int READ = NORM ? 5 : 2;
#define REST_AT(token, atom) (TILE * READ + (token) * (ATOMS - READ) + (atom) - READ)
#if MHC_NORM
#define ATOM_AT(token, atom)                                                                                 \
    (((atom) < STREAMS    ? (token) * STREAMS + (atom)                                                       \
      : (atom) == STREAMS ? TILE * STREAMS + (token)                                                         \
                          : REST_AT(token, atom)) *                                                          \
     4)
#else
#define ATOM_AT(token, atom) (((atom) < READ ? (token) * READ + (atom) : REST_AT(token, atom)) * 4)
#endif

// H_res of up to eight tokens: lane 4 k + i computes row i of token k, whose number in the sequence is t.
__device__ __forceinline__ void finish_held(const float* logits, int tokens, int t, int lane,
                                            float* mappings) {
    __syncwarp();
    if (tokens == 0) return;
    const float4 z =
        lane / 4 < tokens ? *(const float4*)(logits + lane * 4) : make_float4(0.f, 0.f, 0.f, 0.f);
    float h[STREAMS] = {z.x, z.y, z.z, z.w};
    sinkhorn_rows(h);
    if (lane / 4 < tokens) {
        float* to = mappings + (u64)t * ROWS + 2 * STREAMS;
        const int i = lane % 4;
        if (V4)
#pragma unroll
            for (int j = 0; j < STREAMS; j++) to[j * STREAMS + i] = h[j];  // comb is H_res transposed
        else
            *(float4*)(to + i * STREAMS) = make_float4(h[0], h[1], h[2], h[3]);
    }
    __syncwarp();
}

// With NORM: the sum over slices of a lane's atom, even and odd slices apart, as where h_pre is written,
// whose bits must be the same.
__device__ __forceinline__ float3 sum_by_halves(const float* p, u32 tag) {
    float3 even = make_float3(0.f, 0.f, 0.f), odd = even;
#pragma unroll 1
    for (int s = 0; s < SLICES; s += QUAD_LOADS) {
        Tagged v[QUAD_LOADS];
        bool missing;
        do {
            missing = false;
#pragma unroll
            for (int k = 0; k < QUAD_LOADS; k++) v[k] = get(p + (s + k) * PART);
#pragma unroll
            for (int k = 0; k < QUAD_LOADS; k++) missing |= s + k < SLICES && v[k].tag != tag;
        } while (missing);
#pragma unroll
        for (int k = 0; k < QUAD_LOADS; k += 2) {
            if (s + k < SLICES) even = add(even, make_float3(v[k].x, v[k].y, v[k].z));
            if (s + k + 1 < SLICES) odd = add(odd, make_float3(v[k + 1].x, v[k + 1].y, v[k + 1].z));
        }
    }
    return add(even, odd);
}
// With NORM: h_pre r of the group's tokens first to first + 7 of tile `it`, which begins at `token`, to `to`;
// saves what backward wants of this slice's tokens. h_pre: given with PREVIOUS.
__device__ __forceinline__ void read_scaled(float* to, const float* of_tile, int first, int token, int it,
                                            int slice, int T, int lane, float gate_pre, float shift_pre,
                                            float eps, const float* h_pre, const Norm& norm) {
    // Lane 4 t + i has atom i of token t, and of the fifth every fourth slice.
    const float3 quad = sum_by_halves(of_tile + ATOM_AT(first, 0) + lane * 4, it + 1);
    float3 across = sum_slices<4, FIFTH_LOADS>(of_tile + ATOM_AT(first + lane / STREAMS, STREAMS),
                                               lane % STREAMS, PART, it + 1);
    across.x = sum_axis<1>(across.x), across.y = sum_axis<1>(across.y);
    const float inverse = rsqrtf(__fmaf_rn(sum_axis<1>(quad.y), 1.f / (STREAMS * CHANNELS), eps));
    const int r = first + lane / STREAMS, t = token + r;
    const float h =
        PREVIOUS ? h_pre[(u64)min(t, T - 1) * STREAMS + lane % STREAMS]
                 : sigmoid(__fmaf_rn(__fmul_rn(quad.x, inverse), gate_pre, shift_pre)) + (V4 ? EPS : 0.f);
    const Read v = read_norm(h, quad, across, lane, norm.eps);
    to[lane] = __fmul_rn(h, v.inverse_rms);
    if ((TILE * it + r) % SLICES == slice && t < T) {
        norm.saved[(u64)t * KEPT + lane % STREAMS] = v.with_l;
        if (lane % STREAMS == 0) norm.saved[(u64)t * KEPT + STREAMS] = v.inverse_rms;
    }
}
