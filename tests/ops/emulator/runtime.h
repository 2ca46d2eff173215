// Runs the threads of a CUDA kernel as fibers of one CPU thread. device.h has what the sources call; launch.py
// puts the two and the sources together.
//
// A fiber runs until it has to wait. Who goes on is the scheduler's choice, a function of the seed: so a run can
// be repeated, and orders that a GPU takes once in a million runs are tried at will. Copies and the atoms that
// blocks exchange arrive later, in any order. Where nobody can go on, that is a deadlock, and everybody's wait is told.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

typedef uint32_t u32;
typedef uint64_t u64;

struct Options {  // as in launch.py
  u64 seed;
  int order;             // 0: in turn, 1: a random warp, 2: a random lane
  int copies;            // 0: arrive at random, 1: as late as can be, 2: at once
  int resident;          // blocks at a time
  int late_blocks;       // a block starts only when nobody else can go on
  int starved_block;     // -1: of every block
  u32 starved_warps, starved_lanes;  // who goes on only when nobody else can
};
struct Region {  // of global memory, an argument
  char* address;
  u64 bytes;
  const char* name;
};
struct Map {  // a TensorMap's content
  u64 address, tokens, streams, channels;
};

const u32 SHARED = 1024;     // the address of a block's first byte of shared memory
const int STATIC = 8192;     // bytes for shared arrays of fixed size
const int CANARY = 1024;     // bytes behind the dynamic part that nobody may write
const u64 BARRIER = 0xba44ull << 48;
const int STACK = 64 << 10;
enum State { RUNS, COLLECTIVE, ARRIVAL, THREADS_, MEMORY, STORED, ENDED };

struct Block;
struct Warp;
struct Fiber {
  void* stack_pointer;
  Block* block;
  Warp* warp;
  int thread, lane, starved, state, repeats, unread;
  u64 what, more, epoch;
};
struct Warp {
  Block* block;
  int index, kind, registers;
  u32 ready[2], arrived;
  Fiber* fibers;
  void* slots[32];
};
struct Barrier {
  u32 count, pending, phase;
  long bytes;
  std::vector<Fiber*> waiting;
};
struct Static {
  std::string name;
  u32 offset, bytes;
};
struct Block {
  int number, live;
  unsigned char* arena;
  u32 dynamic, used;
  std::map<int, Static> statics;
  std::deque<Barrier> barriers;
  std::vector<Fiber*> threads[16];  // waiting at named barriers
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  char* stacks;
};
struct Op {
  enum { LOAD, READ, WRITE, PUT } kind;
  Fiber* by;
  Block* block;
  Map map;
  int channel, stream, token;
  u32 shared, barrier;
  char* to;
  u64 number;
  unsigned char data[2048];
};

inline Fiber* current;
inline void* scheduler_stack;
inline Options options;
inline std::string failure;
inline u64 random_state, epoch, numbers;
inline u64 progress, looked_again;  // whatever is no load; and how much of it there was at the last second look
inline std::vector<Warp*> queue[2];
inline std::vector<Op*> ops;
inline std::vector<Fiber*> spinning;
inline std::vector<Region> regions;
inline std::vector<Block*> resident;
inline void (*kernel)(void**);
inline void** kernel_arguments;

extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
const int SAVED = 8, RETURN = 6;  // words; the last one keeps the stack aligned as after a call
#elif defined(__aarch64__)
asm(R"(.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
const int SAVED = 20, RETURN = 11;
#else
#error "no switch between fibers for this CPU"
#endif

inline u32 random(u32 below) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return u32((random_state >> 32) * below >> 32);
}

// ---- fibers ----

inline void make_ready(Fiber* f) {
  Warp* w = f->warp;
  const int class_ = f->starved;
  f->state = RUNS;
  if (!w->ready[class_]) queue[class_].push_back(w);
  w->ready[class_] |= 1u << f->lane;
}
inline void switch_away() { emulator_switch(&current->stack_pointer, scheduler_stack); }
inline void wait(int state, u64 what, u64 more = 0) {
  current->state = state;
  current->what = what;
  current->more = more;
  switch_away();
}
inline void yield() {
  make_ready(current);
  switch_away();
}
inline void fail(const std::string& why) {
  if (failure.empty()) {
    failure = why;
    if (current)
      failure += " (block " + std::to_string(current->block->number) + ", warp " + std::to_string(current->warp->index) +
                 ", lane " + std::to_string(current->lane) + ")";
  }
  if (current) switch_away();
}
// The function of all 32 lanes' arguments, once the last lane is here.
inline void meet(int kind, void* mine, void (*work)(void**)) {
  Warp* w = current->warp;
  if (options.order && random(16) == 0) yield();
  if (w->arrived && w->kind != kind) fail("lanes of a warp meet at different instructions");
  w->kind = kind;
  w->slots[current->lane] = mine;
  w->arrived |= 1u << current->lane;
  if (w->arrived != 0xffffffffu) return wait(COLLECTIVE, kind);
  w->arrived = 0;
  progress++;
  if (work) work(w->slots);
  for (int lane = 0; lane < 32; lane++)
    if (lane != current->lane) make_ready(w->fibers + lane);
}
inline void meet_threads(int id, u32 count) {
  auto& here = current->block->threads[id];
  if (here.size() + 1 < count) {
    here.push_back(current);
    return wait(THREADS_, id, count);
  }
  progress++;
  for (Fiber* f : here) make_ready(f);
  here.clear();
}

// ---- shared memory and its barriers ----

inline unsigned char* at(Block* b, u32 address, u32 bytes, u32 alignment) {
  const bool inside = address >= SHARED && address - SHARED + bytes <= b->dynamic + CANARY + STATIC;
  if (!inside || address % alignment) fail(inside ? "shared memory out of alignment" : "shared memory out of bounds");
  return b->arena + (inside ? address - SHARED : 0);
}
template <class T, int ID>
T& shared(const char* name) {
  Block* b = current->block;
  auto found = b->statics.find(ID);
  if (found == b->statics.end()) {
    b->used = (b->used + 15) / 16 * 16;
    if (b->used + sizeof(T) > b->dynamic + CANARY + STATIC) fail("STATIC of runtime.h is too little");
    found = b->statics.emplace(ID, Static{name, b->used, u32(sizeof(T))}).first;
    b->used += sizeof(T);
  }
  return *(T*)(b->arena + found->second.offset);
}
inline Barrier& barrier(Block* b, u32 address) {
  const u64 word = *(u64*)at(b, address, 8, 8);
  static Barrier none;
  if (word >> 48 == BARRIER >> 48) return b->barriers[word & 0xffffffff];
  fail("no barrier here, or not yet");
  return none;
}
inline void settle(Barrier& b) {
  if (b.pending || b.bytes) return;
  b.phase++;
  progress++;
  b.pending = b.count;
  for (Fiber* f : b.waiting) make_ready(f);
  b.waiting.clear();
}
inline void arrive(Block* block, u32 address, long bytes) {
  Barrier& b = barrier(block, address);
  if (b.pending == 0) fail("more arrivals than a barrier counts");
  b.pending--;
  b.bytes += bytes;
  settle(b);
}
// A waiter looks again when it goes on, as on a GPU: by then another phase may be through.
inline void wait_barrier(u32 address, u32 parity) {
  if (options.order && random(8) == 0) yield();
  while ((barrier(current->block, address).phase & 1) == parity) {
    barrier(current->block, address).waiting.push_back(current);
    wait(ARRIVAL, address, parity);
  }
}

// ---- global memory ----

inline void changed(const void* p) {
  epoch++;
  progress++;
  size_t kept = 0;
  for (Fiber* f : spinning) {
    if (f->more && f->more != (u64)p) spinning[kept++] = f;
    else make_ready(f);
  }
  spinning.resize(kept);
}
inline void spin(const void* p, bool one) {
  spinning.push_back(current);
  wait(MEMORY, (u64)p, one ? (u64)p : 0);
}
// Called at every load that a loop may repeat until something changes: who has seen nothing new for long waits.
inline void look(const void* p) {
  Fiber* f = current;
  const bool again = f->epoch == epoch && f->state == RUNS, same = f->what == (u64)p;
  f->repeats = again ? f->repeats + 1 : 0;
  f->more = again && same ? f->more + 1 : 0;  // loads of this very address
  f->what = (u64)p;
  f->epoch = epoch;
  const bool one = f->more > 16;
  if (one || f->repeats > 256) {
    f->repeats = 0;
    spin(p, one);
    f->more = 0;
  } else if (options.order && random(64) == 0) {
    yield();
  }
}

// ---- copies ----

inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }
inline void box(Op* op) {
  for (u32 row = 0; row < 16; row++)
    for (u32 chunk = 0; chunk < 8; chunk++) {
      const u64 token = op->token + row, channel = op->channel + 8 * chunk;
      unsigned char* data = op->data + row * 128 + chunk * 16;
      unsigned char* inside = nullptr;
      if (op->kind != Op::WRITE) inside = at(op->block, swizzled(op->shared + row * 128 + chunk * 16), 16, 16);
      if (op->kind == Op::READ) {
        memcpy(data, inside, 16);
        continue;
      }
      const u64 n = channel >= op->map.channels || token >= op->map.tokens ? 0 : std::min<u64>(8, op->map.channels - channel);
      char* outside = (char*)op->map.address + 2 * ((token * op->map.streams + op->stream) * op->map.channels + channel);
      if (op->kind == Op::LOAD) {
        memset(inside, 0, 16);
        memcpy(inside, outside, 2 * n);
      } else {
        memcpy(outside, data, 2 * n);
      }
    }
}
inline void complete(size_t k) {
  Op* op = ops[k];
  if (op->kind == Op::PUT)  // those of one place keep their order
    for (size_t other = 0; other < ops.size(); other++)
      if (ops[other]->kind == Op::PUT && ops[other]->to == op->to && ops[other]->number < op->number) op = ops[k = other];
  if (op->kind == Op::PUT) {
    memcpy(op->to, op->data, 16);
    changed(op->to);
  } else {
    box(op);
  }
  if (op->kind == Op::LOAD) {
    Barrier& b = barrier(op->block, op->barrier);
    b.bytes -= sizeof(op->data);
    settle(b);
  }
  if (op->kind == Op::READ) {
    op->kind = Op::WRITE;
    if (--op->by->unread == 0 && op->by->state == STORED) make_ready(op->by);
    return;
  }
  ops[k] = ops.back();
  ops.pop_back();
  delete op;
}
inline void issue(Op* op) {
  op->by = current;
  op->block = current->block;
  op->number = numbers++;
  ops.push_back(op);
  if (options.copies == 2) {
    complete(ops.size() - 1);
    if (ops.size() && ops.back() == op) complete(ops.size() - 1);
  }
}
inline void copy(Op* op) {
  if (op->shared % 128) fail("a copy's place in shared memory is out of alignment");
  if (op->map.channels % 8 || op->map.address % 16) fail("a tensor's rows are out of alignment");
  if (op->kind == Op::READ) current->unread++;
  else memset(at(current->block, op->shared, sizeof(op->data), 128), 0xff, sizeof(op->data));
  issue(op);
}
inline void put(float* to, const void* data) {
  if ((u64)to % 16) fail("an atom is out of alignment");
  Op* op = new Op;
  op->kind = Op::PUT;
  op->to = (char*)to;
  memcpy(op->data, data, 16);
  issue(op);
}
// What this warp has put is there.
inline void flush() {
  for (size_t k = 0; k < ops.size();) {
    if (ops[k]->kind == Op::PUT && ops[k]->by && ops[k]->by->warp == current->warp) complete(k), k = 0;
    else k++;
  }
}

// ---- blocks ----

inline void run_fiber() {
  kernel(kernel_arguments);
  progress++;
  current->state = ENDED;
  current->block->live--;
  switch_away();
}
inline Block* start_block(int number, int threads, int dynamic) {
  Block* b = new Block;
  b->number = number;
  b->live = threads;
  b->dynamic = dynamic;
  b->used = dynamic + CANARY;
  const size_t bytes = (dynamic + CANARY + STATIC + 1023) / 1024 * 1024;
  b->arena = (unsigned char*)aligned_alloc(1024, bytes);
  memset(b->arena, 0xff, bytes);  // NaN in every format
  b->stacks = (char*)mmap(nullptr, (size_t)threads * STACK, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  b->warps.resize(threads / 32);
  b->fibers.resize(threads);
  for (int t = 0; t < threads; t++) {
    Fiber& f = b->fibers[t];
    Warp& w = b->warps[t / 32];
    f = Fiber{};
    f.block = b, f.warp = &w, f.thread = t, f.lane = t % 32;
    if (f.lane == 0) {
      w = Warp{};
      w.block = b, w.index = t / 32, w.fibers = &f;
    }
    f.starved = (options.starved_block < 0 || options.starved_block == number) && options.starved_warps >> t / 32 & 1 &&
                options.starved_lanes >> f.lane & 1;
    // Stacks begin at different places of their pages, else all would share a few lines of the caches.
    u64* top = (u64*)(b->stacks + (size_t)(t + 1) * STACK - t * 832 % 16384 / 64 * 64) - SAVED;
    memset(top, 0, SAVED * 8);
    top[RETURN] = (u64)run_fiber;
    f.stack_pointer = top;
    make_ready(&f);
  }
  return b;
}
inline void free_block(Block* b) {
  munmap(b->stacks, b->fibers.size() * STACK);
  free(b->arena);
  delete b;
}
inline void end_block(Block* b) {
  current = nullptr;
  const std::string name = "block " + std::to_string(b->number);
  for (Op* op : ops)
    if (op->block == b && (op->kind == Op::LOAD || op->kind == Op::READ)) fail(name + " has ended before a copy of it");
  for (int k = 0; k < CANARY; k++)
    if (b->arena[b->dynamic + k] != 0xff) fail(name + " wrote behind its shared memory");
  int registers = 0;
  for (size_t w = 0; w < b->warps.size(); w++) {
    const int own = b->warps[w].registers ? b->warps[w].registers : 128;
    if (w % 4 && b->warps[w].registers != b->warps[w - 1].registers) fail("warps of a warpgroup set other registers");
    registers += own * 32;
  }
  if (registers > 65536) fail("more registers than a multiprocessor has");
  for (auto& f : b->fibers)
    for (int k = 0; k < 64; k++)
      if (b->stacks[(size_t)f.thread * STACK + k]) fail("STACK of runtime.h is too little");
  for (Op* op : ops)
    if (op->block == b) op->block = nullptr, op->by = nullptr;  // puts and writes on their way
  free_block(b);
}

inline std::string place_of(u64 p) {
  for (auto& r : regions)
    if (p >= (u64)r.address && p < (u64)r.address + r.bytes)
      return std::string(r.name) + " + " + std::to_string((p - (u64)r.address) / 4) + " words";
  return "somewhere";
}
inline std::string describe(Fiber& f) {
  static const char* kinds[] = {"__syncwarp", "a shuffle", "a vote", "ldmatrix", "mma"};
  char text[200];
  switch (f.state) {
    case RUNS: return "could go on";
    case COLLECTIVE: return std::string("wait for the other lanes at ") + kinds[f.what];
    case THREADS_:
      snprintf(text, sizeof text, "wait at barrier %d of %d threads, where %d are", (int)f.what, (int)f.more,
               (int)f.block->threads[f.what].size());
      return text;
    case MEMORY: {
      const u32* p = (const u32*)f.what;
      return "spin on " + place_of(f.what) + ", which holds " + std::to_string(p[0]) +
             (f.what % 16 ? "" : ", tag " + std::to_string(p[3]));
    }
    case STORED: return "wait until stores are read";
    case ENDED: return "have ended";
  }
  std::string name = "?";
  for (auto& [id, s] : f.block->statics)
    if (f.what - SHARED >= s.offset && f.what - SHARED < s.offset + s.bytes)
      name = s.name + "[" + std::to_string((f.what - SHARED - s.offset) / 8) + "]";
  Barrier& b = barrier(f.block, f.what);
  snprintf(text, sizeof text, "wait for parity %d of %s, which is in phase %u and lacks %u arrivals, %ld bytes", (int)f.more,
           name.c_str(), b.phase, b.pending, b.bytes);
  return text;
}
inline std::string everybody() {
  std::string all;
  for (Block* b : resident) {
    all += "\nblock " + std::to_string(b->number) + ":";
    for (auto& w : b->warps)
      for (int first = 0, next; first < 32; first = next) {
        const std::string what = describe(w.fibers[first]);
        for (next = first + 1; next < 32 && describe(w.fibers[next]) == what;) next++;
        if (w.fibers[first].state == ENDED) continue;
        all += "\n  warp " + std::to_string(w.index) + ", lanes " + std::to_string(first) + " to " +
               std::to_string(next - 1) + " " + what;
      }
  }
  return all;
}

inline void run_warp(int class_) {
  auto& q = queue[class_];
  static u64 turn;
  const size_t k = options.order ? random(q.size()) : turn++ % q.size();
  Warp* w = q[k];
  u32 lanes = w->ready[class_];
  const int first = options.order ? random(32) : 0;
  if (options.order == 2) {
    int lane = first;
    while (!(lanes >> lane & 1)) lane = (lane + 1) % 32;
    lanes = 1u << lane;
  }
  w->ready[class_] &= ~lanes;
  if (!w->ready[class_]) {
    q[k] = q.back();
    q.pop_back();
  }
  for (int n = 0; n < 32 && failure.empty(); n++) {
    const int lane = (first + n) % 32;
    if (!(lanes >> lane & 1)) continue;
    current = w->fibers + lane;
    emulator_switch(&scheduler_stack, current->stack_pointer);
  }
  current = nullptr;
}

inline void run(int blocks, int threads, int dynamic) {
  int started = 0;
  for (u64 step = 0; failure.empty(); step++) {
    for (size_t k = 0; k < resident.size();) {
      if (resident[k]->live) {
        k++;
        continue;
      }
      end_block(resident[k]);
      resident.erase(resident.begin() + k);
    }
    const bool can_start = started < blocks && (int)resident.size() < options.resident;
    if (can_start && (!options.late_blocks || resident.empty())) {
      resident.push_back(start_block(started++, threads, dynamic));
      continue;
    }
    if (options.copies == 0 && !ops.empty() && random(4) == 0) complete(random(ops.size()));
    if (!queue[0].empty()) run_warp(0);
    else if (!ops.empty()) complete(random(ops.size()));
    else if (!queue[1].empty()) run_warp(1);
    else if (can_start) resident.push_back(start_block(started++, threads, dynamic));
    else if (resident.empty()) return;
    else if (!spinning.empty() && looked_again != progress) {
      // Many loads in a row may also be just that: whoever sleeps over them looks once more.
      looked_again = progress;
      for (Fiber* f : spinning) make_ready(f);
      spinning.clear();
    } else {
      failure = "deadlock" + everybody();
      return;
    }
    if (step > 300000000) failure = "no end in sight" + everybody();
  }
}

template <class... A, size_t... K>
void call(void (*f)(A...), void** p, std::index_sequence<K...>) {
  f(*(A*)p[K]...);
}
template <class... A>
void call(void (*f)(A...), void** p) {
  call(f, p, std::index_sequence_for<A...>());
}

inline int launch(void (*invoke)(void**), int blocks, int threads, int dynamic, const Options* how, void** arguments,
                  const Region* known, int count, char* message, int room) {
  options = *how;
  random_state = options.seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  kernel = invoke;
  kernel_arguments = arguments;
  failure.clear();
  regions.assign(known, known + count);
  current = nullptr;
  progress = 1, looked_again = 0;
  run(blocks, threads, dynamic);
  for (Op* op : ops) delete op;  // after a failure
  for (Block* b : resident) free_block(b);
  ops.clear(), spinning.clear(), resident.clear(), queue[0].clear(), queue[1].clear();
  snprintf(message, room, "%s", failure.c_str());
  return !failure.empty();
}

}  // namespace emulator
