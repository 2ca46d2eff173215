// One kernel for the CPU: MHC_SOURCE has the kernel MHC_KERNEL.
#include "device.h"

#include MHC_SOURCE

extern "C" int emulate(int blocks, int threads, int dynamic, const emulator::Options* how, void** arguments,
                       const emulator::Region* regions, int count, char* message, int room) {
    auto invoke = [](void** p) { emulator::call(MHC_KERNEL, p); };
    return emulator::launch(invoke, blocks, threads, dynamic, how, arguments, regions, count, message, room);
}
