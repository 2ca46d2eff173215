// Stands for device.cuh, and for what CUDA itself gives the sources. See runtime.h.
#pragma once

#include "scheduler.h"

#define EMULATED
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define SHARED_VARIABLE(type, name) auto& name = emulator::shared<type, __COUNTER__>(#name)
#define SHARED_ARRAY(type, name, count) SHARED_VARIABLE(type[count], name)
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::current->block->arena

// The fault that a test plants, if any: one name, which BUG(name) of the sources asks for.
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
constexpr bool same_text(const char* a, const char* b) {
    return *a == *b && (!*a || same_text(a + 1, b + 1));
}
template <bool PLANTED>
struct Planted {
    static constexpr bool value = PLANTED;
};
#define BUG(name) (Planted<same_text(TEXT_OF(name), TEXT(MHC_BUG))>::value)

#include "shape.cuh"

struct Index {
    u32 x;
};
#define threadIdx (Index{(u32)emulator::current->thread})

struct alignas(8) float2 {
    float x, y;
};
struct float3 {
    float x, y, z;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float __uint_as_float(u32 bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline u32 bits_of(float f) {
    u32 bits;
    memcpy(&bits, &f, 4);
    return bits;
}
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __logf(float x) { return __builtin_logf(x); }
inline float rsqrtf(float x) { return 1.f / __builtin_sqrtf(x); }

// ---- warps and blocks ----

enum { SYNC, SHUFFLE, VOTE, LDMATRIX, MMA };
inline void check_mask(u32 mask) {
    if (mask != 0xffffffffu) emulator::fail("not all lanes are asked for");
}
inline void __syncwarp() { emulator::meet(SYNC, nullptr, nullptr); }
inline void __syncthreads() { emulator::meet_threads(0, emulator::current->block->fibers.size()); }
template <int COUNT>
inline void sync_threads(int id) {
    emulator::meet_threads(id, COUNT);
}
struct Shuffled {
    u32 value, got;
    int source;
};
template <class T>
inline T shuffle(T value, int source) {
    static_assert(sizeof(T) == 4);
    Shuffled mine{0, 0, source};
    memcpy(&mine.value, &value, 4);
    emulator::meet(SHUFFLE, &mine, [](void** all) {
        for (int lane = 0; lane < 32; lane++) {
            Shuffled* s = (Shuffled*)all[lane];
            s->got = ((Shuffled*)all[s->source & 31])->value;
        }
    });
    memcpy(&value, &mine.got, 4);
    return value;
}
template <class T>
inline T __shfl_sync(u32 mask, T value, int source, int width = 32) {
    check_mask(mask);
    return shuffle(value, (emulator::current->lane & -width) | (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(u32 mask, T value, int bits, int width = 32) {
    check_mask(mask);
    const int lane = emulator::current->lane, source = lane ^ bits;
    return shuffle(value, (source & -width) > (lane & -width) ? lane : source);
}
inline bool __any_sync(u32 mask, bool value) {
    check_mask(mask);
    emulator::meet(VOTE, &value, [](void** all) {
        bool any = false;
        for (int lane = 0; lane < 32; lane++) any |= *(bool*)all[lane];
        for (int lane = 0; lane < 32; lane++) *(bool*)all[lane] = any;
    });
    return value;
}
template <int REGISTERS>
inline void set_registers() {
    emulator::current->warp->registers = REGISTERS;
}

#define MARK(it, point)

// ---- barriers and copies ----

inline u32 shared_address(const void* p) {
    return emulator::SHARED + u32((unsigned char*)p - emulator::current->block->arena);
}
inline void barrier_init(u32 bar, u32 count) {
    auto* b = emulator::current->block;
    *(emulator::u64*)emulator::at(b, bar, 8, 8) = emulator::BARRIER | b->barriers.size();
    b->barriers.push_back({count, count, 0, 0, {}});
}
inline void barrier_arrive(u32 bar) { emulator::arrive(emulator::current->block, bar, 0); }
inline void barrier_expect(u32 bar, u32 bytes) { emulator::arrive(emulator::current->block, bar, bytes); }
inline void barrier_wait(u32 bar, u32 parity) { emulator::wait_barrier(bar, parity); }
inline u64 evict_first() { return 0; }
inline void fence_copies() {}
struct alignas(64) TensorMap {
    u64 opaque[16];
};
inline void copy_boxes(bool load, u32 shared, const TensorMap& map, int channel, int stream, int token,
                       int streams, u32 bar) {
    for (int k = 0; k < streams * BOXES; k++) {
        auto* op = new emulator::Op;
        op->kind = load ? emulator::Op::LOAD : emulator::Op::READ;
        memcpy(&op->map, &map, sizeof op->map);
        op->channel = channel + k % BOXES * BOX, op->stream = stream + k / BOXES, op->token = token;
        op->shared = shared + k * BOX_BYTES, op->barrier = bar;
        emulator::copy(op);
    }
}
template <int COUNT>
inline void load_boxes(u32 to, const TensorMap& from, int channel, int stream, int token, u32 bar, u64) {
    copy_boxes(true, to, from, channel, stream, token, COUNT, bar);
}
inline void load_bytes(u32 to, const void* from, u32 bytes, u32 bar) {
    auto* op = new emulator::Op;
    op->kind = emulator::Op::BYTES;
    op->shared = to, op->barrier = bar, op->to = (char*)from, op->bytes = bytes;
    emulator::copy_bytes(op);
}
template <int COUNT>
inline void store_boxes(const TensorMap& to, int channel, int stream, int token, u32 from) {
    copy_boxes(false, from, to, channel, stream, token, COUNT, 0);
}
inline void await_stored() {
    if (emulator::current->unread) emulator::wait(emulator::STORED, 0);
}

// ---- global memory between blocks ----

struct Tagged {
    float x, y, z;
    u32 tag;
};
inline void put(float* to, float x, float y, float z, u32 tag) {
    const Tagged v{x, y, z, tag};
    emulator::put(to, &v);
}
inline Tagged get(const float* from) {
    emulator::look(from);
    Tagged v;
    memcpy(&v, from, 16);
    return v;
}
inline u32 atomicAdd(u32* p, u32 more) {
    const u32 before = *p;
    *p += more;
    emulator::changed(p);
    return before;
}
inline void __threadfence() { emulator::flush(); }
inline void publish(u32* count, int lane) {
    __syncwarp();
    if (lane == 0) __threadfence(), atomicAdd(count, 1);
}
inline void await(const u32* count, u32 wanted, int lane) {
    if (lane == 0)
        while (*count < wanted) emulator::spin(count, true);
    __syncwarp();
}
inline float load_fresh(const float* p) { return *p; }
inline float4 load_fresh4(const float* p) { return *(const float4*)p; }

// ---- bf16 and tensor cores ----

inline float low_half(u32 pair) { return __uint_as_float(pair << 16); }
inline float high_half(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
inline u32 rounded(float f) {
    const u32 bits = bits_of(f);
    return f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack(float low, float high) { return rounded(low) | rounded(high) << 16; }
inline u32 pack_rest(float low, float high, u32 pair) {
    return pack(low - low_half(pair), high - high_half(pair));
}

struct Loaded {
    u32* r;
    u32 address;
};
template <bool TRANSPOSED>
inline void ldmatrix(u32 (&r)[4], u32 address) {
    Loaded mine{r, address};
    emulator::meet(LDMATRIX, &mine, [](void** all) {
        bf16 m[4][8][8];
        for (int lane = 0; lane < 32; lane++)
            memcpy(m[lane / 8][lane % 8],
                   emulator::at(emulator::current->block, ((Loaded*)all[lane])->address, 16, 16), 16);
        for (int lane = 0; lane < 32; lane++)
            for (int k = 0; k < 4; k++) {
                const int row = lane / 4, column = lane % 4 * 2;
                const u32 low = TRANSPOSED ? m[k][column][row] : m[k][row][column];
                const u32 high = TRANSPOSED ? m[k][column + 1][row] : m[k][row][column + 1];
                ((Loaded*)all[lane])->r[k] = low | high << 16;
            }
    });
}
inline void load_matrices(u32 (&r)[4], u32 address) { ldmatrix<false>(r, address); }
inline void load_transposed(u32 (&r)[4], u32 address) { ldmatrix<true>(r, address); }

struct Factors {
    float* d;
    u32 a[4], b[2];
};
// Products are exact, as on a GPU; sums are of doubles and rounded once, on a GPU they are cut off now and
// then.
template <int K>
inline void multiply(void** all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Factors* f = (Factors*)all[lane];
        const int row = lane / 4, pair = lane % 4 * 2;
        for (int half = 0; half < K / 8; half++) {
            for (int k = 0; k < 2; k++) {
                a[row + 8 * k][8 * half + pair] = low_half(f->a[2 * half + k]);
                a[row + 8 * k][8 * half + pair + 1] = high_half(f->a[2 * half + k]);
            }
            b[8 * half + pair][row] = low_half(f->b[half]);
            b[8 * half + pair + 1][row] = high_half(f->b[half]);
        }
    }
    for (int row = 0; row < 16; row++) {
        double sum[8] = {};
        for (int k = 0; k < K; k++)
            for (int n = 0; n < 8; n++) sum[n] += (double)a[row][k] * b[k][n];
        for (int n = 0; n < 8; n++) {
            float* d = ((Factors*)all[row % 8 * 4 + n / 2])->d + row / 8 * 2 + n % 2;
            *d = float(*d + sum[n]);
        }
    }
}
inline void multiply16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Factors mine{d, {a0, a1, a2, a3}, {b0, b1}};
    emulator::meet(MMA, &mine, multiply<16>);
}
inline void multiply8(float (&d)[4], u32 a0, u32 a1, u32 b0) {
    Factors mine{d, {a0, a1, 0, 0}, {b0, 0}};
    emulator::meet(MMA, &mine, multiply<8>);
}

// ---- functions; those of a GPU are off by an ulp or two ----

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
inline float exp_fast(float x) { return flushed(__builtin_exp2f(flushed(x * 1.4426950408889634f))); }
inline float divide(float a, float b) { return a / b; }
inline float quotient(float a, float b) { return a * flushed(1.f / flushed(b)); }
