// Runs the threads of a CUDA kernel as fibers of one CPU thread. device.h has what the sources call;
// kernel.cpp puts the two and the sources together, launch.py builds it.
//
// A fiber runs until it has to wait. Who goes on is the scheduler's choice, a function of the seed: so a run
// can be repeated, and orders that a GPU takes once in a million runs are tried at will. Copies and the atoms
// that blocks exchange arrive later, in any order. Where nobody can go on, that is a deadlock, and
// everybody's wait is told.

#pragma once

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
    int order;                         // 0: in turn, 1: a random warp, 2: a random lane
    int copies;                        // 0: arrive at random, 1: as late as can be, 2: at once
    int resident;                      // blocks at a time
    int late_blocks;                   // a block starts only when nobody else can go on
    int starved_block;                 // -1: of every block
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

const u32 TILE = MHC_TILE;  // tokens of a box
const u32 SHARED = 1024;    // the address of a block's first byte of shared memory
const int STATIC = 8192;    // bytes for shared arrays of fixed size
const int CANARY = 1024;    // bytes behind the dynamic part that nobody may write
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
    enum { LOAD, BYTES, READ, WRITE, PUT } kind;
    Fiber* by;
    Block* block;
    Map map;
    int channel, stream, token;
    u32 shared, barrier, bytes;
    char* to;  // of BYTES where they come from
    u64 number;
    unsigned char data[TILE * 128];
};

inline Fiber* current;
inline void* scheduler_stack;
inline Options options;
inline std::string failure;
inline u64 random_state, epoch, numbers;
inline u64 progress;      // whatever is no load
inline u64 looked_again;  // how much of it there was at the last second look
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
            failure += " (block " + std::to_string(current->block->number) + ", warp " +
                       std::to_string(current->warp->index) + ", lane " + std::to_string(current->lane) + ")";
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
    if (!inside || address % alignment)
        fail(inside ? "shared memory out of alignment" : "shared memory out of bounds");
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
        if (f->more && f->more != (u64)p)
            spinning[kept++] = f;
        else
            make_ready(f);
    }
    spinning.resize(kept);
}
inline void spin(const void* p, bool one) {
    spinning.push_back(current);
    wait(MEMORY, (u64)p, one ? (u64)p : 0);
}
// Called at every load that a loop may repeat until something changes: who has seen nothing new for long
// waits.
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
    for (u32 row = 0; row < TILE; row++)
        for (u32 chunk = 0; chunk < 8; chunk++) {
            const u64 token = op->token + row, channel = op->channel + 8 * chunk;
            unsigned char* data = op->data + row * 128 + chunk * 16;
            unsigned char* inside = nullptr;
            if (op->kind != Op::WRITE)
                inside = at(op->block, swizzled(op->shared + row * 128 + chunk * 16), 16, 16);
            if (op->kind == Op::READ) {
                memcpy(data, inside, 16);
                continue;
            }
            const Map& m = op->map;
            const u64 n =
                channel >= m.channels || token >= m.tokens ? 0 : std::min<u64>(8, m.channels - channel);
            char* outside = (char*)m.address + 2 * ((token * m.streams + op->stream) * m.channels + channel);
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
        for (size_t k2 = 0; k2 < ops.size(); k2++)
            if (ops[k2]->kind == Op::PUT && ops[k2]->to == op->to && ops[k2]->number < op->number)
                op = ops[k = k2];
    if (op->kind == Op::PUT) {
        memcpy(op->to, op->data, 16);
        changed(op->to);
    } else if (op->kind == Op::BYTES) {
        memcpy(at(op->block, op->shared, op->bytes, 16), op->to, op->bytes);
    } else {
        box(op);
    }
    if (op->kind == Op::LOAD || op->kind == Op::BYTES) {
        Barrier& b = barrier(op->block, op->barrier);
        b.bytes -= op->kind == Op::LOAD ? sizeof(op->data) : op->bytes;
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
    if (op->kind == Op::READ)
        current->unread++;
    else
        memset(at(current->block, op->shared, sizeof(op->data), 128), 0xff, sizeof(op->data));
    issue(op);
}
inline void copy_bytes(Op* op) {
    if ((u64)op->to % 16 || op->bytes % 16) fail("bytes to be copied are out of alignment");
    memset(at(current->block, op->shared, op->bytes, 16), 0xff, op->bytes);
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
        if (ops[k]->kind == Op::PUT && ops[k]->by && ops[k]->by->warp == current->warp)
            complete(k), k = 0;
        else
            k++;
    }
}

}  // namespace emulator
