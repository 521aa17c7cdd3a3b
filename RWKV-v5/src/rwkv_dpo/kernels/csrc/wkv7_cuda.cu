// WKV-7 on NVIDIA GPUs. Legend and contract: rwkv_dpo/kernels/wkv7/__init__.py.
//
//     taken_t = S_{t-1}^T a_t      S_t = diag(w_t) S_{t-1} + b_t taken_t^T + k_t v_t^T      y_t = S_t^T r_t           S [key][value]
//
//   forward    walk_tokens        forwards, split over values: y, taken, the state at the end, and the states before every segment
//
// With G_t = dL/dS_t, the gradient of y_t included:
//
//     G_t += r_t gy_t^T         gv = G_t^T k    g_taken = G_t^T b                            G_{t-1} = diag(w_t) G_t + a_t g_taken^T
//                               gr = S_t gy    gk = G_t v    gb = G_t taken    ga = S_{t-1} g_taken
//                               g_log_w = w * (row sums of S_{t-1} * G_t)
//
//   backward   walk_tokens        backwards, split over values: the first line, and the gradients of the states after every segment
//              segment_gradients  split over keys and segments: the other two, which sum over values
//
// The entry points take raw device pointers and return a cudaError_t (0: all launches were accepted).
#include "driver.cuh"
#include "wkv_gradients.cuh"
#include "wkv_walk.cuh"

namespace {

// Backwards, the payload is gy and `first` the gradient of the last state.
template <class T>
Walk<T> walk_of(const void* r, const void* k, const void* a, const void* b, const float* log_w, const void* payload, const float* first) {
    return {{static_cast<const T*>(r), static_cast<const T*>(k), static_cast<const T*>(a), static_cast<const T*>(b)},
            static_cast<const T*>(payload), log_w, nullptr, first};
}

template <class T, int NP>
struct Forward {
    static cudaError_t run(const Layout& layout, const void* r, const void* k, const void* v, const void* a, const void* b,
                           const float* log_w, const float* state0, float* states, float* taken, void* y, float* state_end) {
        Walk<T> walk = walk_of<T>(r, k, a, b, log_w, v, state0);
        walk.out = static_cast<T*>(y), walk.taken = taken, walk.kept = states, walk.last = state_end;
        return walk_all<true, false, T, NP>(layout, walk);
    }
};

template <class T, int NP>
struct Backward {
    static cudaError_t run(const Layout& layout, const void* r, const void* k, const void* v, const void* a, const void* b,
                           const float* log_w, const void* gy, const float* states, const float* taken, const float* g_state_end,
                           float* state_grads, float* g_taken, void* gr, void* gk, void* gv, void* ga, void* gb, float* g_log_w,
                           float* g_state0) {
        Walk<T> walk = walk_of<T>(r, k, a, b, log_w, gy, g_state_end);
        walk.out = static_cast<T*>(gv), walk.taken = g_taken, walk.kept = state_grads, walk.last = g_state0;
        const cudaError_t error = walk_all<true, true, T, NP>(layout, walk);
        if (error != cudaSuccess) return error;
        const Gradients<T> of{{walk.keys[0], walk.keys[1], walk.keys[2], walk.keys[3]},
                              static_cast<const T*>(v), static_cast<const T*>(gy), log_w, nullptr, taken, g_taken, states, state_grads,
                              {static_cast<T*>(gr), static_cast<T*>(gk), static_cast<T*>(ga), static_cast<T*>(gb)}, g_log_w, nullptr};
        return all_gradients<true, T, NP>(layout, of);
    }
};

}  // namespace

extern "C" int wkv7_forward(const Layout* layout, const void* r, const void* k, const void* v, const void* a, const void* b,
                            const float* log_w, const float* state0, float* states, float* taken, void* y, float* state_end) {
    return dispatch<Forward, 32, 64, 128>(*layout, r, k, v, a, b, log_w, state0, states, taken, y, state_end);
}

extern "C" int wkv7_backward(const Layout* layout, const void* r, const void* k, const void* v, const void* a, const void* b,
                             const float* log_w, const void* gy, const float* states, const float* taken, const float* g_state_end,
                             float* state_grads, float* g_taken, void* gr, void* gk, void* gv, void* ga, void* gb, float* g_log_w,
                             float* g_state0) {
    return dispatch<Backward, 32, 64, 128>(*layout, r, k, v, a, b, log_w, gy, states, taken, g_state_end, state_grads, g_taken, gr, gk, gv,
                                           ga, gb, g_log_w, g_state0);
}
