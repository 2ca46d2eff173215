// What the kernels need of the hardware, sm_90: all PTX is here.
#pragma once
#ifndef EMULATED  // else tests/ops/emulator/device.h, for a CPU, stands in its place

#include "shape.cuh"

#define SHARED_VARIABLE(type, name) __shared__ type name
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Notes the clock at which a tile is at a point of its way, for benchmarks/hopper_stages.py alone.
#ifdef MHC_MARKS
// [block, tile of the group, point]
extern "C" __device__ long long marks[MHC_MARKS][MHC_MARKED][MHC_POINTS];
#define MARK(it, point)                                                                                      \
    if ((it) < MHC_MARKED) marks[blockIdx.x][it][point] = clock64()
#else
#define MARK(it, point)
#endif

// ---- barriers and copies ----

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
}
__device__ __forceinline__ u64 evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Between ordinary stores to shared memory and a copy out of it or into it.
__device__ __forceinline__ void fence_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Describes a tensor [T, streams, C]: `Box` of launch.py. Zeros outside.
struct __align__(64) TensorMap {
    u64 opaque[16];
};
// Copies of this slice's channels of COUNT streams, from `stream` on: boxes one behind the other. If a stream
// has whole boxes the map has dimensions (BOX, tokens, boxes, streams), and one instruction, which takes a
// thread a hundred clocks, copies all of them.
#define LOAD_BOX(to, channel, box, stream)                                                                   \
    asm volatile(                                                                                            \
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "   \
        "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),                                                 \
        "l"(&from), "r"(channel), "r"(token), "r"(box), "r"(stream), "r"(bar), "l"(policy)                   \
        : "memory")
#define STORE_BOX(from, channel, box, stream)                                                                \
    asm volatile(                                                                                            \
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(    \
            &to),                                                                                            \
        "r"(channel), "r"(token), "r"(box), "r"(stream), "r"(from)                                           \
        : "memory")
template <int COUNT>
__device__ __forceinline__ void load_boxes(u32 to, const TensorMap& from, int channel, int stream, int token,
                                           u32 bar, u64 policy) {
    if (CHANNELS % BOX == 0)
        LOAD_BOX(to, 0, channel / BOX, stream);
    else
#pragma unroll
        for (int k = 0; k < COUNT * BOXES; k++)
            LOAD_BOX(to + k * BOX_BYTES, channel + k % BOXES * BOX, 0, stream + k / BOXES);
}
// Bytes as they lie in global memory, sixteen by sixteen.
__device__ __forceinline__ void load_bytes(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(from), "r"(bytes), "r"(bar)
        : "memory");
}
template <int COUNT>
__device__ __forceinline__ void store_boxes(const TensorMap& to, int channel, int stream, int token,
                                            u32 from) {
    if (CHANNELS % BOX == 0)
        STORE_BOX(from, 0, channel / BOX, stream);
    else
#pragma unroll
        for (int k = 0; k < COUNT * BOXES; k++)
            STORE_BOX(from + k * BOX_BYTES, channel + k % BOXES * BOX, 0, stream + k / BOXES);
}
// Waits until the TMA has read what store_boxes gave it.
__device__ __forceinline__ void await_stored() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Sets the registers of a thread, for all four warps of a warpgroup; a block's four warpgroups share 512.
template <int REGISTERS>
__device__ __forceinline__ void set_registers() {
    if (REGISTERS > 128)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int COUNT>
__device__ __forceinline__ void sync_threads(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(COUNT) : "memory");
}

// ---- global memory between blocks ----
//
// Three numbers and a tag are stored and loaded as one 16-byte atom, so no fence is needed.

struct Tagged {
    float x, y, z;
    u32 tag;
};

__device__ __forceinline__ void put(float* to, float x, float y, float z, u32 tag) {
    asm volatile("{\n.reg .b64 low, high;\n.reg .b128 all;\n"
                 "mov.b64 low, {%1, %2};\nmov.b64 high, {%3, %4};\nmov.b128 all, {low, high};\n"
                 "st.relaxed.gpu.global.b128 [%0], all;\n}" ::"l"(to),
                 "f"(x), "f"(y), "f"(z), "r"(tag)
                 : "memory");
}
__device__ __forceinline__ Tagged get(const float* from) {
    Tagged v;
    asm volatile("{\n.reg .b64 low, high;\n.reg .b128 all;\n"
                 "ld.relaxed.gpu.global.b128 all, [%4];\n"
                 "mov.b128 {low, high}, all;\nmov.b64 {%0, %1}, low;\nmov.b64 {%2, %3}, high;\n}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=r"(v.tag)
                 : "l"(from)
                 : "memory");
    return v;
}

// Once a launch, with fences. What this warp's lanes have stored is visible to whoever sees the count.
__device__ __forceinline__ void publish(u32* count, int lane) {
    __syncwarp();
    if (lane == 0) {
        __threadfence();
        atomicAdd(count, 1u);
    }
}
__device__ __forceinline__ void await(const u32* count, u32 wanted, int lane) {
    if (lane == 0) {
        u32 seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
        } while (seen < wanted);
    }
    __syncwarp();
}
// Past L1, which may hold an older value.
__device__ __forceinline__ float load_fresh(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float4 load_fresh4(const float* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// ---- bf16 and tensor cores ----

__device__ __forceinline__ float low_half(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
// Rounded to nearest: `low` in bits 0 to 15.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
// What bf16 leaves of two floats, as bf16 again.
__device__ __forceinline__ u32 pack_rest(float low, float high, u32 rounded) {
    return pack(low - low_half(rounded), high - high_half(rounded));
}
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
// d[16, 8] += a[16, 16] b[16, 8]
__device__ __forceinline__ void multiply16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// d[16, 8] += a[16, 8] b[8, 8]
__device__ __forceinline__ void multiply8(float (&d)[4], u32 a0, u32 a1, u32 b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

// ---- functions ----

__device__ __forceinline__ float exp_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
}
__device__ __forceinline__ float divide(float a, float b) {
    float y;
    asm("div.full.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
// a / b within 2 ulp, for b far from the ends of the range
__device__ __forceinline__ float quotient(float a, float b) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
    return a * y;
}

#endif
