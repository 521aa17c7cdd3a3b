// WKV-5 on NVIDIA GPUs: a sequence is cut into segments that run in parallel. Legend and contract: rwkv_dpo/kernels/wkv5/__init__.py.
//
//   1 segment_states   the state that every segment would reach by itself, from zero            [n_segments, H, N, N]
//   2 scan_segments    over the segments of a sequence: turns those into the true starting states, in place
//   3 segment_outputs  the plain recurrence inside every segment, from its true start; writes y
//
// and backwards in time with the gradient G of the state: 1 with (r, gy) for (k, v), 2 from the last segment to the first, then
// segment_gradients. Decays only ever multiply (w^n with n >= 0): nothing overflows, whatever time_decay is.
//
// A thread owns a square of the state in registers, and reads what it needs of a token from shared memory in quads. Per token and
// thread, for the squares of 8 x 8 that 64 threads make a head of 64 of (instructions counted in the machine code for sm_90):
//
//                          arithmetic            floats from and to shared memory           instructions   with all around
//   segment_states         64                    16                                          74             100
//   segment_outputs        192 (3 per element)   24 + 8 partial sums out, 8 back in         210             253
//   gradients, forward     328 (5 per element)   32 + 8, 8                                  345             398
//   gradients, backward    256 (4 per element)   32 + 16, 16                                285             347
//
// An SM computes 128 fp32 FMAs a clock and moves 32 floats, so that four operations per float is where the two meet. A thread per
// column would read 129 floats for those 192 operations and wait for shared memory. 100 (twice) + 253 + 398 + 347 instructions make
// 0.17 ms for 4096 tokens and 16 heads of 64 on an H100 (132 SMs, 4 x 1.75e9 warp instructions a second each), if every clock
// issues one; beside them go 0.15 GB of tokens and 0.18 GB of states, the latter mostly within the 50 MB of L2.
//
// The entry points take raw device pointers and return a cudaError_t (0: all launches were accepted).
#include "driver.cuh"
#include "wkv5_forward.cuh"
#include "wkv5_gradients.cuh"

namespace {

cudaError_t scan(const Layout& layout, const Problem& problem, const float* initial, bool reverse, float* states, float* last) {
    const int slices = (layout.head_size * layout.head_size + kScanThreads - 1) / kScanThreads;
    return launch(scan_segments, dim3(layout.n_sequences, layout.n_heads, slices), kScanThreads, layout.stream, problem,
                  layout.first_segment, initial, reverse, states, last);
}

// The pass over [n_segments, H] blocks.
template <int NP, class... Parameters, class... Arguments>
cudaError_t per_segment(const Layout& layout, const Problem& problem, int kinds, void (*kernel)(Problem, Parameters...),
                        Arguments... arguments) {
    return launch(kernel, dim3(layout.n_segments, layout.n_heads, kinds), Tiling<NP>::kThreads, layout.stream, problem, arguments...);
}

template <class T, int NP>
struct Forward {
    static cudaError_t run(const Layout& layout, const Problem& problem, const void* r, const void* k, const void* v,
                           const float* state0, float* states, void* y, float* state_end) {
        const Tokens<T> tokens{static_cast<const T*>(r), static_cast<const T*>(k), static_cast<const T*>(v), nullptr};
        cudaError_t error = per_segment<NP>(layout, problem, 1, segment_states<T, NP>, tokens.k, tokens.v, false, states);
        if (error == cudaSuccess) error = scan(layout, problem, state0, false, states, state_end);
        if (error == cudaSuccess)
            error = per_segment<NP>(layout, problem, 1, segment_outputs<T, NP>, tokens.r, tokens.k, tokens.v, states, static_cast<T*>(y));
        return error;
    }
};

template <class T, int NP>
struct Backward {
    static cudaError_t run(const Layout& layout, const Problem& problem, const void* r, const void* k, const void* v, const void* gy,
                           const float* states, const float* gstate_end, float* state_grads, void* gr, void* gk, void* gv, float* gw,
                           float* gu, float* gstate0) {
        const Tokens<T> tokens{static_cast<const T*>(r), static_cast<const T*>(k), static_cast<const T*>(v),
                               static_cast<const T*>(gy)};
        cudaError_t error = per_segment<NP>(layout, problem, 1, segment_states<T, NP>, tokens.r, tokens.gy, true, state_grads);
        if (error == cudaSuccess) error = scan(layout, problem, gstate_end, true, state_grads, gstate0);
        if (error == cudaSuccess)
            error = per_segment<NP>(layout, problem, 2, segment_gradients<T, NP>, tokens, states, state_grads, static_cast<T*>(gr),
                                    static_cast<T*>(gk), static_cast<T*>(gv), gw, gu);
        return error;
    }
};

template <template <class, int> class Pass, class... Arguments>
int run(const Layout& layout, const float* time_decay, const float* u, Arguments... arguments) {
    const Problem problem{layout.n_heads, layout.head_size, layout.segments, time_decay, u};
    return dispatch<Pass, 32, 64, 96, 128>(layout, problem, arguments...);
}

}  // namespace

extern "C" int wkv5_forward(const Layout* layout, const float* time_decay, const float* u, const void* r, const void* k, const void* v,
                            const float* state0, float* states, void* y, float* state_end) {
    return run<Forward>(*layout, time_decay, u, r, k, v, state0, states, y, state_end);
}

extern "C" int wkv5_backward(const Layout* layout, const float* time_decay, const float* u, const void* r, const void* k, const void* v,
                             const void* gy, const float* states, const float* gstate_end, float* state_grads, void* gr, void* gk,
                             void* gv, float* gw, float* gu, float* gstate0) {
    return run<Backward>(*layout, time_decay, u, r, k, v, gy, states, gstate_end, state_grads, gr, gk, gv, gw, gu, gstate0);
}
