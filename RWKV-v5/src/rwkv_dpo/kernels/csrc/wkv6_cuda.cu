// WKV-6 on NVIDIA GPUs. Legend and contract: rwkv_dpo/kernels/wkv6/__init__.py.
//
//   forward    walk_tokens        forwards, split over values: y, the state at the end, and the states before every segment
//   backward   walk_tokens        backwards, with k read for r, r written for k and gy for v: gv, and the gradients of the states
//              segment_gradients  split over keys and segments: gr, gk, the gradient of log w, and a part of gu of each segment
//
// Decays only ever multiply: nothing overflows, whatever log w is, and nothing is subtracted: a fast decay's tiny gradient is as exact as any
// other. The entry points take raw device pointers and return a cudaError_t (0: all launches were accepted).
#include "driver.cuh"
#include "wkv_gradients.cuh"
#include "wkv_walk.cuh"

namespace {

// read: what the state is read with; written: what is written into it. Backwards, `first` is the gradient of the last state.
template <class T>
Walk<T> walk_of(const void* read, const void* written, const void* payload, const float* log_w, const float* u, const float* first) {
    return {{static_cast<const T*>(read), static_cast<const T*>(written)}, static_cast<const T*>(payload), log_w, u, first};
}

template <class T, int NP>
struct Forward {
    static cudaError_t run(const Layout& layout, const void* r, const void* k, const void* v, const float* log_w, const float* u,
                           const float* state0, float* states, void* y, float* state_end) {
        Walk<T> walk = walk_of<T>(r, k, v, log_w, u, state0);
        walk.out = static_cast<T*>(y), walk.kept = states, walk.last = state_end;
        return walk_all<false, false, T, NP>(layout, walk);
    }
};

template <class T, int NP>
struct Backward {
    static cudaError_t run(const Layout& layout, const void* r, const void* k, const void* v, const float* log_w, const float* u,
                           const void* gy, const float* states, const float* g_state_end, float* state_grads, void* gr, void* gk, void* gv,
                           float* g_log_w, float* gu, float* g_state0) {
        Walk<T> walk = walk_of<T>(k, r, gy, log_w, u, g_state_end);
        walk.out = static_cast<T*>(gv), walk.kept = state_grads, walk.last = g_state0;
        const cudaError_t error = walk_all<false, true, T, NP>(layout, walk);
        if (error != cudaSuccess) return error;
        const Gradients<T> of{{static_cast<const T*>(r), static_cast<const T*>(k)},
                              static_cast<const T*>(v), static_cast<const T*>(gy), log_w, u, nullptr, nullptr, states, state_grads,
                              {static_cast<T*>(gr), static_cast<T*>(gk)}, g_log_w, gu};
        return all_gradients<false, T, NP>(layout, of);
    }
};

}  // namespace

extern "C" int wkv6_forward(const Layout* layout, const void* r, const void* k, const void* v, const float* log_w, const float* u,
                            const float* state0, float* states, void* y, float* state_end) {
    return dispatch<Forward, 32, 64, 128>(*layout, r, k, v, log_w, u, state0, states, y, state_end);
}

extern "C" int wkv6_backward(const Layout* layout, const void* r, const void* k, const void* v, const float* log_w, const float* u,
                             const void* gy, const float* states, const float* g_state_end, float* state_grads, void* gr, void* gk,
                             void* gv, float* g_log_w, float* gu, float* g_state0) {
    return dispatch<Backward, 32, 64, 128>(*layout, r, k, v, log_w, u, gy, states, g_state_end, state_grads, gr, gk, gv, g_log_w, gu,
                                           g_state0);
}
