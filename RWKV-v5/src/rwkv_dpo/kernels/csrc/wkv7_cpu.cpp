// WKV-7 forward and backward for CPUs, fp32 inside. The contract and the legend are in rwkv_dpo/kernels/wkv7/__init__.py.
//
//     taken_t = S_{t-1}^T a_t      S_t = diag(w_t) S_{t-1} + b_t taken_t^T + k_t v_t^T      y_t = S_t^T r_t           S [key][value]
//
// With G_t = dL/dS_t, the gradient of y_t included, the backward runs from the last token to the first:
//
//     G_t += r_t gy_t^T         gr = S_t gy    gk = G_t v    gv = G_t^T k    gb = G_t taken    g_taken = G_t^T b    ga = S_{t-1} g_taken
//     g_log_w = w * (row sums of S_{t-1} * G_t)                                           G_{t-1} = diag(w_t) G_t + a_t g_taken^T
//
// It takes S at every token: S is kept at every SEGMENT tokens and replayed from there, where taken_t is known. Running S backwards
// would divide by w again and again.
//
// Values are independent of one another but for gr, gk, ga, gb and g_log_w, which sum over them: the backward keeps S and G as
// [value][key]. Every sum has a fixed order: results do not depend on the number of threads.

#include "wkv_cpu.h"

namespace {

constexpr int SEGMENT = 16;

// The inputs of one head. w is fp32.
struct Inputs { Rows r, k, v, a, b, w; };
struct Gradients { Rows gy, gr, gk, gv, ga, gb, g_log_w; };

template <class Head>
struct Kernel : Head {
    using typename Head::Vec;
    using typename Head::Row;
    using Head::LANES, Head::TILE, Head::W, Head::size, Head::load, Head::store, Head::dot, Head::multiply;

    Inputs in;

    Kernel(const Head& head, const Inputs& in) : Head(head), in(in) {}

    // One token: S becomes the state after it; `taken` comes as this token's, and leaves as the next one's, whose a is given.
    template <bool WITH_Y>
    void step(float* state, const float* w, const float* b, const float* k, const float* v, const float* r, const float* a_next,
              float* taken, float* y) const {
        const int n = size();
        for (int l = 0; l < n; l += LANES * TILE) {
            Vec t[TILE], value[TILE], sum[TILE] = {}, next[TILE] = {};
            for (int i = 0; i < TILE; i++) t[i] = load(taken + l + i * LANES), value[i] = load(v + l + i * LANES);
            for (int m = 0; m < n; m++) {
                for (int i = 0; i < TILE; i++) {
                    const int at = m * n + l + i * LANES;
                    Vec s = load(state + at) * w[m];
                    s += b[m] * t[i];
                    s += k[m] * value[i];
                    store(state + at, s);
                    if (WITH_Y) sum[i] += r[m] * s;
                    next[i] += a_next[m] * s;
                }
            }
            for (int i = 0; i < TILE; i++) {
                if (WITH_Y) store(y + l + i * LANES, sum[i]);
                store(taken + l + i * LANES, next[i]);
            }
        }
    }

    // Runs from `state` over tokens, writing y; or, without, what each takes out of the state, and S at every SEGMENT tokens to `kept`.
    template <bool WITH_Y>
    void sweep(int64_t first, int count, float* state, const Rows* result, float* all_taken, float* kept) const {
        const int n = size();
        alignas(64) Row r, k, v, b, w, a, taken = {}, y;
        if (count > 0) in.a.load(first, n, a), take(state, a, taken);
        for (int t = 0; t < count; t++) {
            const int64_t token = first + t;
            in.k.load(token, n, k), in.v.load(token, n, v), in.b.load(token, n, b), in.w.load(token, n, w);
            if (t + 1 < count) in.a.load(token + 1, n, a);
            if (WITH_Y) {
                in.r.load(token, n, r);
                step<true>(state, w, b, k, v, r, a, taken, y);
                result->store(token, n, y);
                continue;
            }
            if (t % SEGMENT == 0) transpose(kept + int64_t(t / SEGMENT) * n * n, state, n);
            std::memcpy(all_taken + int64_t(t) * n, taken, n * sizeof(float));
            // The last segment is replayed from its start.
            if (t + 1 < count) step<false>(state, w, b, k, v, nullptr, a, taken, nullptr);
        }
    }

    void take(const float* state, const float* a, float* taken) const {
        const int n = size();
        for (int l = 0; l < n; l += LANES) {
            Vec sum = {};
            for (int m = 0; m < n; m++) sum += a[m] * load(state + m * n + l);
            store(taken + l, sum);
        }
    }

    // S after each token of a segment, `states[t]` being S before token t; [value][key].
    void replay(int64_t first, int count, const float* all_taken, float* states) const {
        const int n = size();
        alignas(64) Row k, v, b, w;
        for (int t = 0; t < count; t++, states += n * n) {
            in.k.load(first + t, n, k), in.v.load(first + t, n, v), in.b.load(first + t, n, b), in.w.load(first + t, n, w);
            const float* taken = all_taken + int64_t(t) * n;
            for (int l = 0; l < n; l += LANES * TILE) {
                Vec key[TILE], back[TILE], decay[TILE];
                for (int i = 0; i < TILE; i++) {
                    const int at = l + i * LANES;
                    key[i] = load(k + at), back[i] = load(b + at), decay[i] = load(w + at);
                }
                for (int j = 0; j < n; j++)
                    for (int i = 0; i < TILE; i++) {
                        const int at = j * n + l + i * LANES;
                        Vec s = load(states + at) * decay[i];
                        s += taken[j] * back[i];
                        s += v[j] * key[i];
                        store(states + n * n + at, s);
                    }
            }
        }
    }

    // The gradients of one token; G is that of the state after it, without the gradient of y, and becomes that of the state before.
    void token_gradients(int64_t token, const Gradients& g, const float* before, const float* after, const float* taken, float* G) const {
        const int n = size();
        alignas(64) Row r, k, v, a, b, w, gy, gr, gk, gv, ga, gb, gw, g_taken;
        in.r.load(token, n, r), in.k.load(token, n, k), in.v.load(token, n, v), in.a.load(token, n, a), in.b.load(token, n, b);
        in.w.load(token, n, w), g.gy.load(token, n, gy);
        for (int j = 0; j < n; j++) {
            Vec with_k = {}, with_b = {};
            for (int i = 0; i < n; i += LANES) {
                const Vec sum = load(G + j * n + i) + gy[j] * load(r + i);
                store(G + j * n + i, sum);
                with_k += sum * load(k + i);
                with_b += sum * load(b + i);
            }
            gv[j] = sum_of(with_k);
            g_taken[j] = sum_of(with_b);
        }
        for (int l = 0; l < n; l += LANES * TILE) {
            Vec to_r[TILE] = {}, to_k[TILE] = {}, to_a[TILE] = {}, to_b[TILE] = {}, to_w[TILE] = {};
            for (int j = 0; j < n; j++)
                for (int i = 0; i < TILE; i++) {
                    const int key = l + i * LANES, at = j * n + key;
                    const Vec grad = load(G + at), s = load(before + at);
                    to_r[i] += gy[j] * load(after + at);
                    to_k[i] += v[j] * grad;
                    to_b[i] += taken[j] * grad;
                    to_a[i] += g_taken[j] * s;
                    to_w[i] += s * grad;
                    store(G + at, grad * load(w + key) + g_taken[j] * load(a + key));
                }
            for (int i = 0; i < TILE; i++) {
                const int key = l + i * LANES;
                store(gr + key, to_r[i]), store(gk + key, to_k[i]), store(ga + key, to_a[i]), store(gb + key, to_b[i]);
                store(gw + key, to_w[i] * load(w + key));
            }
        }
        g.gr.store(token, n, gr), g.gk.store(token, n, gk), g.gv.store(token, n, gv), g.ga.store(token, n, ga), g.gb.store(token, n, gb);
        g.g_log_w.store(token, n, gw);
    }

    // From the last segment to the first; G is that of the last state, and becomes that of the first.
    void backward(int64_t first, int count, const Gradients& g, const float* all_taken, const float* kept, float* states, float* G) const {
        const size_t square = size_t(size()) * size();
        for (int start = (count - 1) / SEGMENT * SEGMENT; count > 0 && start >= 0; start -= SEGMENT) {
            const int tokens = std::min(SEGMENT, count - start);
            std::memcpy(states, kept + start / SEGMENT * square, sizeof(float) * square);
            replay(first + start, tokens, all_taken + int64_t(start) * size(), states);
            for (int t = tokens - 1; t >= 0; t--)
                token_gradients(first + start + t, g, states + t * square, states + (t + 1) * square,
                                all_taken + int64_t(start + t) * size(), G);
        }
    }
};

}  // namespace

// Mirrored field by field in kernels/wkv7/cpu.py. Pointers may be null where it says so.
struct Call {
    int32_t n_threads, n_seqs, n_heads, head_size, dtype;
    const int32_t* cu_seqlens;     // [n_seqs + 1]
    const void *r, *k, *v, *a, *b; // [tokens, n_heads, head_size] in dtype, like y, gy and the gradients
    const float* w;                // [tokens, n_heads, head_size], like g_log_w
    const float* state0;           // [n_seqs, n_heads, head_size, head_size], null for zeros
    void* y;
    float* state_end;              // like state0
    const void* gy;
    const float* g_state_end;      // null for zeros
    void *gr, *gk, *gv, *ga, *gb;
    float* g_log_w;
    float* g_state0;               // null if not wanted
};

namespace {

Inputs inputs_of(const Call& c, int h) {
    const auto rows = [&](const void* tensor) { return Rows(tensor, c.dtype, h, c.n_heads, c.head_size); };
    return {rows(c.r), rows(c.k), rows(c.v), rows(c.a), rows(c.b), Rows(c.w, FP32, h, c.n_heads, c.head_size)};
}

template <class Head>
void forward(const Head& head, const Call& c) {
    const int n = c.head_size;
#pragma omp parallel for schedule(dynamic) num_threads(c.n_threads)
    for (int item = 0; item < c.n_seqs * c.n_heads; item++) {
        const int s = item / c.n_heads, h = item % c.n_heads;
        const int64_t at = int64_t(item) * n * n;
        const Rows y(c.y, c.dtype, h, c.n_heads, n);
        start_state(c.state_end + at, c.state0 ? c.state0 + at : nullptr, n);
        const Span span = forwards(c.cu_seqlens, s);
        Kernel<Head>(head, inputs_of(c, h)).template sweep<true>(span.first, span.count, c.state_end + at, &y, nullptr, nullptr);
    }
}

template <class Head>
void backward(const Head& head, const Call& c) {
    const int n = c.head_size;
    int longest = 0;
    for (int s = 0; s < c.n_seqs; s++) longest = std::max(longest, c.cu_seqlens[s + 1] - c.cu_seqlens[s]);
    const size_t square = size_t(n) * n;
#pragma omp parallel num_threads(c.n_threads)
    {
        const auto kept = std::make_unique<float[]>((longest / SEGMENT + 1) * square), states = std::make_unique<float[]>((SEGMENT + 1) * square);
        const auto taken = std::make_unique<float[]>(size_t(longest + 1) * n);
        alignas(64) float state[MAX_HEAD_SIZE * MAX_HEAD_SIZE];
#pragma omp for schedule(dynamic)
        for (int item = 0; item < c.n_seqs * c.n_heads; item++) {
            const int s = item / c.n_heads, h = item % c.n_heads;
            const auto rows = [&](const void* tensor) { return Rows(tensor, c.dtype, h, c.n_heads, n); };
            const auto at = [&](const float* tensor) { return tensor ? tensor + int64_t(item) * n * n : nullptr; };
            const Kernel<Head> kernel(head, inputs_of(c, h));
            const Span span = forwards(c.cu_seqlens, s);
            start_state(state, at(c.state0), n);
            kernel.template sweep<false>(span.first, span.count, state, nullptr, taken.get(), kept.get());
            start_state_transposed(state, at(c.g_state_end), n);
            const Gradients g{rows(c.gy), rows(c.gr), rows(c.gk), rows(c.gv), rows(c.ga), rows(c.gb), Rows(c.g_log_w, FP32, h, c.n_heads, n)};
            kernel.backward(span.first, span.count, g, taken.get(), kept.get(), states.get(), state);
            if (c.g_state0) transpose(c.g_state0 + int64_t(item) * n * n, state, n);
        }
    }
}

}  // namespace

extern "C" void wkv7_forward(const Call* c) {
    with_head(c->head_size, [=](auto head) { forward(head, *c); });
}

extern "C" void wkv7_backward(const Call* c) {
    with_head(c->head_size, [=](auto head) { backward(head, *c); });
}
