// What the two kernels share: n = 4 streams of C channels, bf16, sm_90. Compiled by NVRTC without any header.
//
// A group of G thread blocks works through tiles of 16 tokens; block `slice` of it owns CW channels of all
// four streams. It loads them into shared memory once and keeps them there while the group sums up, through
// global memory, what needs whole rows. Waiting is safe: blocks take tickets as they start, a group is G
// tickets in a row, and a block waits for blocks of its own or an earlier group alone. So the kernel ends
// wherever G blocks can be resident together, whatever else the GPU runs.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

#define N 4
#define M 24
#define BT 16              // tokens of a tile
#define BOX 64             // channels that one copy brings: rows of 128 bytes
#define BOXES (CW / BOX)
#define BOX_BYTES (BT * BOX * 2)
#define EXCHANGE (2 * STAGES)  // slots of the rings in global memory, see `pre.cu`

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- barriers and copies ----

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(bar), "r"(parity) : "memory");
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
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Describes a tensor [T, streams, C]; copies are boxes of 16 tokens x 1 stream x 64 channels, zeros outside.
struct __align__(64) TensorMap {
  u64 opaque[16];
};
// Boxes of this slice's CW channels, one behind the other.
__device__ __forceinline__ void load_boxes(u32 to, const TensorMap& from, int channel, int stream, int token, u32 bar, u64 policy) {
#pragma unroll
  for (int k = 0; k < BOXES; k++)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to + k * BOX_BYTES), "l"(&from), "r"(channel + k * BOX),
        "r"(stream), "r"(token), "r"(bar), "l"(policy) : "memory");
}
__device__ __forceinline__ void store_boxes(const TensorMap& to, int channel, int stream, int token, u32 from) {
#pragma unroll
  for (int k = 0; k < BOXES; k++)
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&to),
                 "r"(channel + k * BOX), "r"(stream), "r"(token), "r"(from + k * BOX_BYTES) : "memory");
}
// Until what store_boxes has been given is read.
__device__ __forceinline__ void await_stored() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Where a copy has put 8 channels from `chunk` * 8 on of a row: the hardware exchanges the sixteen bytes of a row by
// bits 7 to 9 of its address, so that eight rows below each other lie in different banks.
__device__ __forceinline__ u32 place(u32 row, u32 chunk) {
  row += chunk / 8 * BOX_BYTES;
  return row + ((chunk % 8 ^ row >> 7 & 7) << 4);
}
// The registers of a thread from here on, for all four warps of a warpgroup; the four groups of a block share 512.
template <int REGISTERS>
__device__ __forceinline__ void set_registers() {
  if (REGISTERS > 128) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int THREADS>
__device__ __forceinline__ void sync_threads(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

// ---- exchange through global memory ----
//
// Three numbers and a tag are stored and loaded as one 16-byte atom, so no fence is needed: a reader repeats its
// load until it finds the tag of its tile. Memory starts as zeros, tags at 1.

struct Tagged {
  float x, y, z;
  u32 tag;
};

__device__ __forceinline__ void put(float* to, float x, float y, float z, u32 tag) {
  asm volatile(
      "{\n.reg .b64 low, high;\n.reg .b128 all;\n"
      "mov.b64 low, {%1, %2};\nmov.b64 high, {%3, %4};\nmov.b128 all, {low, high};\n"
      "st.relaxed.gpu.global.b128 [%0], all;\n}" ::"l"(to), "f"(x), "f"(y), "f"(z), "r"(tag) : "memory");
}
__device__ __forceinline__ Tagged get(const float* from) {
  Tagged v;
  asm volatile(
      "{\n.reg .b64 low, high;\n.reg .b128 all;\n"
      "ld.relaxed.gpu.global.b128 all, [%4];\n"
      "mov.b128 {low, high}, all;\nmov.b64 {%0, %1}, low;\nmov.b64 {%2, %3}, high;\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=r"(v.tag) : "l"(from) : "memory");
  return v;
}
// Until all slices have put the atom at p + slice * stride. One atom a lane, since what spins must be little; the
// rest of a tile comes at about the same time, and whoever reads it looks at its tags.
__device__ __forceinline__ void await_slices(const float* p, int G, int stride, u32 tag, int lane) {
  for (int s = lane; s < G; s += 32)
    while (get(p + s * stride).tag != tag) {}
  __syncwarp();
}
// K atoms at once, once all have the tag; the loads depend on nothing, so that none waits for another.
template <int K>
__device__ __forceinline__ void get_all(Tagged (&v)[K], const float* (&from)[K], u32 tag) {
  bool missing;
  do {
#pragma unroll
    for (int k = 0; k < K; k++) v[k] = get(from[k]);
    missing = false;
#pragma unroll
    for (int k = 0; k < K; k++) missing |= v[k].tag != tag;
  } while (missing);
}
// The sum over slices `first`, `first` + 2, ..., in this order.
__device__ __forceinline__ float3 sum_every_second(const float* p, int first, int G, int stride, u32 tag) {
  float3 total = make_float3(0.f, 0.f, 0.f);
  for (int s = first; s < G; s += 16) {
    Tagged v[8];
    const float* from[8];
#pragma unroll
    for (int k = 0; k < 8; k++) from[k] = p + min(s + 2 * k, G - 1) * stride;
    get_all(v, from, tag);
#pragma unroll
    for (int k = 0; k < 8; k++)
      if (s + 2 * k < G) total.x += v[k].x, total.y += v[k].y, total.z += v[k].z;
  }
  return total;
}
__device__ __forceinline__ float3 add(float3 even, float3 odd) {
  return make_float3(even.x + odd.x, even.y + odd.y, even.z + odd.z);
}
// The same of lanes that hold one each: the same bits in every lane.
__device__ __forceinline__ float3 add_lanes(float3 v, int even, int odd) {
  return make_float3(__shfl_sync(0xffffffffu, v.x, even) + __shfl_sync(0xffffffffu, v.x, odd),
                     __shfl_sync(0xffffffffu, v.y, even) + __shfl_sync(0xffffffffu, v.y, odd),
                     __shfl_sync(0xffffffffu, v.z, even) + __shfl_sync(0xffffffffu, v.z, odd));
}
// Number k of those that lanes hold three by three, 3 lane to 3 lane + 2.
__device__ __forceinline__ float pick(float3 v, int k) {
  const float x = __shfl_sync(0xffffffffu, v.x, k / 3), y = __shfl_sync(0xffffffffu, v.y, k / 3);
  const float z = __shfl_sync(0xffffffffu, v.z, k / 3);
  return k % 3 == 0 ? x : k % 3 == 1 ? y : z;
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
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
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
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
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
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
}

// ---- coefficients ----

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
__device__ __forceinline__ float sigmoid(float x) { return divide(1.f, 1.f + exp_fast(-x)); }

// Sums and maxima over the rows (j) or columns (i) of 4 x 4 matrices, element 4 i + j in lane 4 i + j of 16.
#define ALL 0xffffffffu
template <int AXIS>  // 0: over i, 1: over j
__device__ __forceinline__ float sum_axis(float v) {
  const int step = AXIS == 0 ? 4 : 1;
  v += __shfl_xor_sync(ALL, v, step);
  return v + __shfl_xor_sync(ALL, v, 2 * step);
}
template <int AXIS>
__device__ __forceinline__ float max_axis(float v) {
  const int step = AXIS == 0 ? 4 : 1;
  v = fmaxf(v, __shfl_xor_sync(ALL, v, step));
  return fmaxf(v, __shfl_xor_sync(ALL, v, 2 * step));
}
template <int AXIS>
__device__ __forceinline__ float log_normalised(float z) {
  z -= max_axis<AXIS>(z);
  return z - __logf(sum_axis<AXIS>(exp_fast(z)));
}
__device__ __forceinline__ float sum16(float v) { return sum_axis<0>(sum_axis<1>(v)); }

#define EPS 1e-6f
#define STEPS (2 * ITERATIONS)  // columns and rows in turn; under V4 softmax, columns, then rows and columns in turn

// Where the logits of all tokens in a warp lie within 30 of each other, Sinkhorn goes by sums and divisions: the
// same numbers as in the log domain, which the rest take, in half the time.
#define SPREAD 30.f

// H_res (under V4 comb) of one logit a lane; past[k] is the matrix behind step k (V4: before it).
// Source: arXiv 2512.24880 Eq. (9); reference.sinkhorn, reference.sinkhorn_deepseek_v4.
__device__ __forceinline__ float sinkhorn(float z, float (&past)[STEPS]) {
#if V4
  float m = exp_fast(z - max_axis<1>(z));
  m = quotient(m, sum_axis<1>(m));
  past[0] = m;
  m += EPS;
#pragma unroll
  for (int k = 1; k < STEPS; k++) {
    past[k] = m;
    m = quotient(m, (k % 2 ? sum_axis<0>(m) : sum_axis<1>(m)) + EPS);
  }
  return m;
#else
  const float top = max_axis<0>(max_axis<1>(z));
  if (!__any_sync(ALL, top - z > SPREAD)) {
    float m = exp_fast(z - top);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      m = quotient(m, k % 2 ? sum_axis<1>(m) : sum_axis<0>(m));
      past[k] = m;
    }
    return m;
  }
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    z = k % 2 ? log_normalised<1>(z) : log_normalised<0>(z);
    past[k] = exp_fast(z);
  }
  return exp_fast(z);
#endif
}

// The same of a row a lane, four lanes a matrix, where nothing past is wanted.
__device__ __forceinline__ void normalise_row(float (&m)[N], float eps) {
  const float scale = quotient(1.f, m[0] + m[1] + (m[2] + m[3]) + eps);
#pragma unroll
  for (int j = 0; j < N; j++) m[j] *= scale;
}
__device__ __forceinline__ void normalise_columns(float (&m)[N], float eps) {
  float total[N];
#pragma unroll
  for (int j = 0; j < N; j++) total[j] = sum_axis<1>(m[j]);  // over the four lanes
#pragma unroll
  for (int j = 0; j < N; j++) m[j] = quotient(m[j], total[j] + eps);
}
__device__ __forceinline__ void log_normalise_row(float (&z)[N]) {
  const float top = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]));
  float total = 0.f;
#pragma unroll
  for (int j = 0; j < N; j++) z[j] -= top, total += exp_fast(z[j]);
#pragma unroll
  for (int j = 0; j < N; j++) z[j] -= __logf(total);
}
__device__ __forceinline__ void sinkhorn_rows(float (&z)[N]) {
  const float top = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])), all = max_axis<1>(top);
  bool wide = false;
#pragma unroll
  for (int j = 0; j < N; j++) wide |= all - z[j] > SPREAD;
#if V4
#pragma unroll
  for (int j = 0; j < N; j++) z[j] = exp_fast(z[j] - top);
  normalise_row(z, 0.f);
#pragma unroll
  for (int j = 0; j < N; j++) z[j] += EPS;
  normalise_columns(z, EPS);
  for (int k = 1; k < ITERATIONS; k++) normalise_row(z, EPS), normalise_columns(z, EPS);
#else
  if (!__any_sync(ALL, wide)) {
#pragma unroll
    for (int j = 0; j < N; j++) z[j] = exp_fast(z[j] - all);
    for (int k = 0; k < ITERATIONS; k++) normalise_columns(z, 0.f), normalise_row(z, 0.f);
    return;
  }
  for (int k = 0; k < ITERATIONS; k++) {
#pragma unroll
    for (int j = 0; j < N; j++) z[j] = log_normalised<1>(z[j]);  // over the four lanes: a column
    log_normalise_row(z);
  }
#pragma unroll
  for (int j = 0; j < N; j++) z[j] = exp_fast(z[j]);
#endif
}

// The gradient of the logits from that of the matrix, exact for the truncated iterations.
__device__ __forceinline__ float sinkhorn_backward(float m, float dm, const float (&past)[STEPS]) {
#if V4
#pragma unroll
  for (int k = STEPS - 1; k > 0; k--) {
    float p = past[k], total = (k % 2 ? sum_axis<0>(p) : sum_axis<1>(p)) + EPS;
    float mean = quotient(k % 2 ? sum_axis<0>(__fmul_rn(dm, p)) : sum_axis<1>(__fmul_rn(dm, p)), total);
    dm = quotient(dm - mean, total);
  }
  float p = past[0];
  return p * (dm - sum_axis<1>(__fmul_rn(dm, p)));
#else
  float dz = dm * m;
#pragma unroll
  for (int k = STEPS - 1; k >= 0; k--) dz -= past[k] * (k % 2 ? sum_axis<1>(dz) : sum_axis<0>(dz));
  return dz;
#endif
}

// ---- who does what ----

struct Place {
  int group, slice, first_channel, width, tiles;  // tiles: how many this group has
};

// Takes a ticket; called by all threads of a block.
__device__ __forceinline__ Place take_place(u32* tickets, int T, int G, int groups) {
  __shared__ u32 ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(tickets, 1u);
  __syncthreads();
  Place p;
  p.group = ticket / G;
  p.slice = ticket % G;
  p.first_channel = p.slice * CW;
  p.width = min(CW, C - p.first_channel);
  p.tiles = ((T + BT - 1) / BT - p.group + groups - 1) / groups;
  return p;
}
// The first token of the group's tile `it` whose coefficients are this slice's to compute; then every G-th.
__device__ __forceinline__ int own_token(const Place& p, int it, int G) {
  int r = (p.slice - (BT * it) % G) % G;
  return r < 0 ? r + G : r;
}
