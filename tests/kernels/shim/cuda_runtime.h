// Just enough of CUDA's runtime to compile a kernel's source with g++ and run it on a CPU, one block after the other.
//
// The threads of a block are fibers of one OS thread: __syncthreads() hands over to the next, so a run is deterministic and a
// barrier costs a microsecond. shim_set_order(seed) shuffles the order of blocks, of warps and of their threads between two barriers: a
// kernel whose results depend on it lacks a barrier or reads what nobody wrote. A warp runs from barrier to barrier by itself, and only its
// own threads meet where they exchange numbers. __shared__ becomes static storage, where AddressSanitizer sees the bounds. Not offered:
// atomics, dynamic shared memory, exchanges within a part of a warp.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using std::min;

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline cudaError_t cudaGetDeviceCount(int* n) {
    *n = 1;
    return cudaSuccess;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr size_t kStackBytes = 256 * 1024;  // AddressSanitizer makes frames large
constexpr unsigned kWarp = 32;

enum class Stop { begin, exchange, barrier, end };

struct Fiber {
    ucontext_t context;  // where it begins
    jmp_buf place;       // where it goes on
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Stop stop;
    float handed_out[2];  // to the other threads of the warp, in turns: one may go on to the next exchange before another has read
    unsigned n_exchanges;
};

inline unsigned order_seed = 0;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline jmp_buf scheduler_place;
inline Fiber* current;
inline void (*body)(void*);
inline void* body_argument;

inline std::vector<unsigned> order_of(unsigned n) {
    std::vector<unsigned> order(n);
    std::iota(order.begin(), order.end(), 0u);
    if (order_seed != 0)
        for (unsigned i = n; i > 1; --i) {
            order_seed = order_seed * 1664525u + 1013904223u;
            std::swap(order[i - 1], order[(order_seed >> 8) % i]);
        }
    return order;
}

// swapcontext asks the kernel for the signal mask, which takes ten times as long as a jump: it only begins a fiber.
inline void run_fiber() {
    body(body_argument);
    current->stop = Stop::end;
    _longjmp(scheduler_place, 1);
}

inline void go_on() {
    if (_setjmp(scheduler_place) != 0) return;
    if (current->stop == Stop::begin)
        swapcontext(&scheduler, &current->context);
    else
        _longjmp(current->place, 1);
}

inline void wait_at(Stop stop) {
    current->stop = stop;
    if (_setjmp(current->place) == 0) _longjmp(scheduler_place, 1);
}

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "shim: %s\n", what);
    std::abort();
}

// Where all of these threads stop.
inline Stop stop_of(unsigned begin, unsigned end, const char* otherwise) {
    const Stop stop = fibers[begin]->stop;
    for (unsigned i = begin; i < end; ++i)
        if (fibers[i]->stop != stop) fail(otherwise);
    return stop;
}

// Runs the threads of a warp to their next barrier, or to their ends.
inline void run_warp(unsigned begin, unsigned end) {
    do {
        for (unsigned i : order_of(end - begin)) {
            threadIdx = dim3(begin + i, 0, 0);
            current = fibers[begin + i].get();
            go_on();
        }
    } while (stop_of(begin, end, "some threads of a warp left an exchange that the others wait at") == Stop::exchange);
}

// Every turn runs each warp to its next barrier; all must meet there or all must be done.
inline void run_block() {
    const unsigned n_threads = blockDim.x;
    while (fibers.size() < n_threads) fibers.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < n_threads; ++i) {
        Fiber& fiber = *fibers[i];
        fiber.stop = Stop::begin;
        fiber.n_exchanges = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_fiber, 0);
    }
    do {
        for (unsigned warp : order_of((n_threads + kWarp - 1) / kWarp)) run_warp(warp * kWarp, std::min(n_threads, (warp + 1) * kWarp));
    } while (stop_of(0, n_threads, "some threads left a barrier that the others wait at") == Stop::barrier);
}

}  // namespace shim

inline void __syncthreads() { shim::wait_at(shim::Stop::barrier); }

inline void __syncwarp() { shim::wait_at(shim::Stop::exchange); }

// `mask`: of all threads of the warp, which must be there.
inline float __shfl_xor_sync(unsigned mask, float x, int lane_mask) {
    if (mask != 0xffffffffu) shim::fail("an exchange within a part of a warp");
    shim::Fiber* fiber = shim::current;
    const unsigned other = threadIdx.x ^ unsigned(lane_mask), turn = fiber->n_exchanges++ % 2;
    if (other / shim::kWarp != threadIdx.x / shim::kWarp || other >= blockDim.x) shim::fail("an exchange with a thread that the warp lacks");
    fiber->handed_out[turn] = x;
    shim::wait_at(shim::Stop::exchange);
    return shim::fibers[other]->handed_out[turn];
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    const uint64_t n_blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
    if (n_blocks == 0 || gridDim.y > 65535 || gridDim.z > 65535 || blockDim.x == 0 || blockDim.x > 1024)
        return cudaErrorInvalidConfiguration;
    auto call = [&] { kernel(arguments...); };
    shim::body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
    shim::body_argument = &call;
    for (unsigned block : shim::order_of(unsigned(n_blocks))) {
        blockIdx = dim3(block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y);
        shim::run_block();
    }
    return cudaSuccess;
}

extern "C" inline __attribute__((used, visibility("default"))) void shim_set_order(unsigned seed) { shim::order_seed = seed; }
