// Blocks as they start and end, the scheduler, and what it tells of a deadlock. See runtime.h.

#pragma once

#include "runtime.h"

namespace emulator {

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
        f.starved = (options.starved_block < 0 || options.starved_block == number) &&
                    options.starved_warps >> t / 32 & 1 && options.starved_lanes >> f.lane & 1;
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
        if (op->block == b && (op->kind == Op::LOAD || op->kind == Op::BYTES || op->kind == Op::READ))
            fail(name + " has ended before a copy of it");
    for (int k = 0; k < CANARY; k++)
        if (b->arena[b->dynamic + k] != 0xff) fail(name + " wrote behind its shared memory");
    int registers = 0;
    for (size_t w = 0; w < b->warps.size(); w++) {
        const int own = b->warps[w].registers ? b->warps[w].registers : 128;
        if (w % 4 && b->warps[w].registers != b->warps[w - 1].registers)
            fail("warps of a warpgroup set other registers");
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
    case RUNS:
        return "could go on";
    case COLLECTIVE:
        return std::string("wait for the other lanes at ") + kinds[f.what];
    case THREADS_:
        snprintf(text, sizeof text, "wait at barrier %d of %d threads, where %d are", (int)f.what,
                 (int)f.more, (int)f.block->threads[f.what].size());
        return text;
    case MEMORY: {
        const u32* p = (const u32*)f.what;
        return "spin on " + place_of(f.what) + ", which holds " + std::to_string(p[0]) +
               (f.what % 16 ? "" : ", tag " + std::to_string(p[3]));
    }
    case STORED:
        return "wait until stores are read";
    case ENDED:
        return "have ended";
    }
    std::string name = "?";
    for (auto& [id, s] : f.block->statics)
        if (f.what - SHARED >= s.offset && f.what - SHARED < s.offset + s.bytes)
            name = s.name + "[" + std::to_string((f.what - SHARED - s.offset) / 8) + "]";
    Barrier& b = barrier(f.block, f.what);
    snprintf(text, sizeof text,
             "wait for parity %d of %s, which is in phase %u and lacks %u arrivals, %ld bytes", (int)f.more,
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
        if (!failure.empty()) return;  // of copies that a block left behind it is gone
        const bool can_start = started < blocks && (int)resident.size() < options.resident;
        if (can_start && (!options.late_blocks || resident.empty())) {
            resident.push_back(start_block(started++, threads, dynamic));
            continue;
        }
        if (options.copies == 0 && !ops.empty() && random(4) == 0) complete(random(ops.size()));
        if (!queue[0].empty())
            run_warp(0);
        else if (!ops.empty())
            complete(random(ops.size()));
        else if (!queue[1].empty())
            run_warp(1);
        else if (can_start)
            resident.push_back(start_block(started++, threads, dynamic));
        else if (resident.empty())
            return;
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

inline int launch(void (*invoke)(void**), int blocks, int threads, int dynamic, const Options* how,
                  void** arguments, const Region* known, int count, char* message, int room) {
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
