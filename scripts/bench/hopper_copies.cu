// What the kernels for Hopper copy, and nothing else: no arithmetic, no exchange between blocks. Stands behind
// device.cuh and common.cuh; hopper_copies.py runs it.
//
// WIDE tensors of four streams (x, g) and SINGLES of one (f, dl) come in and stay for `stay` clocks; with SINGLES a tensor
// of four streams leaves, and always one of one.

#define REGION (BOXES * BOX_BYTES)
#define REGIONS (N * WIDE + SINGLES)
#define STAGE (REGIONS * REGION)

extern "C" __global__ void __launch_bounds__(96, 1)
hopper_copies(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap g, const __grid_constant__ TensorMap f,
              const __grid_constant__ TensorMap dl, const __grid_constant__ TensorMap streams_out,
              const __grid_constant__ TensorMap out, u32* tickets, int T, int groups, int stay) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ __align__(8) u64 full[STAGES], noted[STAGES], empty[STAGES];
  __shared__ long long came[STAGES];
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
    const int stage = it % STAGES, token = (at.group + it * groups) * BT, phase = it / STAGES & 1;
    const u32 tile = base + stage * STAGE, bar = fulls + 8 * stage;
    if (threadIdx.x == 0) {
      if (it >= STAGES) barrier_wait(empties + 8 * stage, phase ^ 1);
      barrier_expect(bar, STAGE);
      load_boxes<N>(tile, x, at.first_channel, 0, token, bar, policy);
      if (WIDE > 1) load_boxes<N>(tile + N * REGION, g, at.first_channel, 0, token, bar, policy);
      if (SINGLES) load_boxes<1>(tile + N * WIDE * REGION, f, at.first_channel, 0, token, bar, policy);
      if (SINGLES > 1) load_boxes<1>(tile + (N * WIDE + 1) * REGION, dl, at.first_channel, 0, token, bar, policy);
    } else if (threadIdx.x == 32) {
      barrier_wait(bar, phase);
      came[stage] = clock64();
      barrier_arrive(notes + 8 * stage);
    } else {
      barrier_wait(notes + 8 * stage, phase);
      barrier_wait(bar, phase);
      while (clock64() - *(volatile long long*)(came + stage) < stay) {}
      if (SINGLES) store_boxes<N>(streams_out, at.first_channel, 0, token, tile);
      store_boxes<1>(out, at.first_channel, 0, token, tile);
      await_stored();
      barrier_arrive(empties + 8 * stage);
    }
  }
}
