// What RWKV-6 and RWKV-7 have of their own between their matrix products, on NVIDIA GPUs; a part of fused_cuda.cu. The same functions for CPUs, written to
// be read first, are in fused_newer.h.
#pragma once

namespace {

constexpr int kTokenMixes = 5;  // of w, k, v, r and g

// The tensors of a token_mixes call.
template <class T>
struct Shares {
    const T *own, *before, *adds;
    const float* mixing[kTokenMixes];
    const T* g_mixed[kTokenMixes];
};

template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS, kBlocks<THREADS>) token_mixes_out(Rows c, Shares<T> t, T* mixed) {
    const int column = threadIdx.x * 4, n = c.n_channels, first = blockIdx.x * c.strip;
    if (column >= n) return;
#pragma unroll 1
    for (int row = first; row < min(c.n_rows, first + c.strip); ++row) {
        const Quad<float> own = load(t.own + int64_t(row) * n + column), before = load(t.before + int64_t(row) * n + column);
#pragma unroll
        for (int m = 0; m < kTokenMixes; ++m) {
            const int64_t at = (int64_t(m) * c.n_rows + row) * n + column;
            const Quad<float> mix = load(t.mixing[m] + column), add = load(t.adds + at);
            Quad<float> out;
            for (int q = 0; q < 4; ++q) out.at[q] = own.at[q] + (before.at[q] - own.at[q]) * (mix.at[q] + add.at[q]);
            store(mixed + at, out);
        }
    }
}

template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS, kBlocks<THREADS>)
    token_mixes_back(Rows c, Shares<T> t, T* g_own, T* g_before, T* g_adds, float* partial) {
    const int column = threadIdx.x * 4, n = c.n_channels, first = blockIdx.x * c.strip;
    if (column >= n) return;
    Sums<kTokenMixes, THREADS <= kFewThreads> sums(partial + int64_t(blockIdx.x) * kTokenMixes * n + column, n, true);
#pragma unroll 1
    for (int row = first; row < min(c.n_rows, first + c.strip); ++row) {
        const Quad<float> own = load(t.own + int64_t(row) * n + column), before = load(t.before + int64_t(row) * n + column);
        Quad<float> to_own{}, to_before{};
#pragma unroll
        for (int m = 0; m < kTokenMixes; ++m) {
            const int64_t at = (int64_t(m) * c.n_rows + row) * n + column;
            Quad<float> along{};
            if (t.g_mixed[m] != nullptr) {
                const Quad<float> grad = load(t.g_mixed[m] + int64_t(row) * n + column);
                const Quad<float> mix = load(t.mixing[m] + column), add = load(t.adds + at);
                for (int q = 0; q < 4; ++q) {
                    const float share = mix.at[q] + add.at[q];
                    along.at[q] = grad.at[q] * (before.at[q] - own.at[q]);
                    to_own.at[q] += grad.at[q] - grad.at[q] * share;
                    to_before.at[q] += grad.at[q] * share;
                }
            }
            store(g_adds + at, along);
            sums.add(m, along);
        }
        store(g_own + int64_t(row) * n + column, to_own);
        store(g_before + int64_t(row) * n + column, to_before);
    }
    sums.finish();
}

// Of a head's k * k_k, four channels of which this thread has: 1 / its length, and whether that is long enough to be a length at all.
struct Length {
    float inverse;
    bool counts;
    __device__ Length(const HeadOf& head, const Quad<float>& scaled, float eps) {
        float squares = 0.f;
        for (int q = 0; q < 4; ++q) squares += scaled.at[q] * scaled.at[q];
        const float length = sqrtf(head.sum(squares));
        inverse = __fdividef(1.f, length < eps ? eps : length);
        counts = length > eps;
    }
};

__device__ inline Quad<float> product(const Quad<float>& a, const Quad<float>& b) {
    Quad<float> result;
    for (int q = 0; q < 4; ++q) result.at[q] = a.at[q] * b.at[q];
    return result;
}

// sigmoid(base + x), four channels.
__device__ inline Quad<float> opened(const Quad<float>& base, const Quad<float>& x) {
    Quad<float> result;
    for (int q = 0; q < 4; ++q) result.at[q] = sigmoid(base.at[q] + x.at[q]);
    return result;
}

template <class T>
__global__ void __launch_bounds__(1024)
    delta_keys_out(Heads c, const T* k, const T* a, const float* a0, const float* k_k, const float* k_a, T* key, T* taken, T* put_back) {
    const int column = threadIdx.x * 4, n = c.n_heads * c.head_size;
    const bool in = column < n;
    const HeadOf head(c.head_size);
    const int first = blockIdx.x * c.strip;
    for (int row = first; row < min(c.n_rows, first + c.strip); ++row) {
        const int64_t at = int64_t(row) * n + column;
        const Quad<float> own = in ? load(k + at) : Quad<float>{};
        const Quad<float> scaled = in ? product(own, load(k_k + column)) : Quad<float>{};
        const Length length(head, scaled, float(c.eps));
        if (!in) continue;
        const Quad<float> rate = opened(load(a0 + column), load(a + at)), share = load(k_a + column);
        Quad<float> written, minus, put;
        for (int q = 0; q < 4; ++q) {
            const float kk = scaled.at[q] * length.inverse;
            written.at[q] = own.at[q] * (1.f + (rate.at[q] - 1.f) * share.at[q]);
            minus.at[q] = -kk;
            put.at[q] = kk * rate.at[q];
        }
        store(key + at, written);
        store(taken + at, minus);
        store(put_back + at, put);
    }
}

template <class T>
__global__ void __launch_bounds__(1024)
    delta_keys_back(Heads c, const T* k, const T* a, const float* a0, const float* k_k, const float* k_a, const T* g_key, const T* g_taken,
                    const T* g_put_back, T* gk, T* ga, float* partial) {
    const int column = threadIdx.x * 4, n = c.n_heads * c.head_size;
    const bool in = column < n;
    const HeadOf head(c.head_size);
    Sums<3, true> sums(partial + int64_t(blockIdx.x) * 3 * n + column, n, in);
    const int first = blockIdx.x * c.strip;
    for (int row = first; row < min(c.n_rows, first + c.strip); ++row) {
        const int64_t at = int64_t(row) * n + column;
        const Quad<float> scaled = in ? product(load(k + at), load(k_k + column)) : Quad<float>{};
        const Length length(head, scaled, float(c.eps));
        const Quad<float> rate = in ? opened(load(a0 + column), load(a + at)) : Quad<float>{};
        const Quad<float> put = in ? load(g_put_back + at) : Quad<float>{}, minus = in ? load(g_taken + at) : Quad<float>{};
        float along = 0.f;
        for (int q = 0; q < 4; ++q) along += (put.at[q] * rate.at[q] - minus.at[q]) * scaled.at[q] * length.inverse;
        along = head.sum(along);
        if (!in) continue;
        if (!length.counts) along = 0.f;
        const Quad<float> own = load(k + at), share = load(k_a + column), scale = load(k_k + column), grad = load(g_key + at);
        Quad<float> to_k, to_a, to_scale, to_share;
        for (int q = 0; q < 4; ++q) {
            const float s = rate.at[q], kk = scaled.at[q] * length.inverse;
            const float g_unit = (put.at[q] * s - minus.at[q] - kk * along) * length.inverse;
            to_a.at[q] = (put.at[q] * kk + grad.at[q] * own.at[q] * share.at[q]) * s * (1.f - s);
            to_k.at[q] = grad.at[q] * (1.f + (s - 1.f) * share.at[q]) + g_unit * scale.at[q];
            to_scale.at[q] = g_unit * own.at[q];
            to_share.at[q] = grad.at[q] * own.at[q] * (s - 1.f);
        }
        store(gk + at, to_k);
        store(ga + at, to_a);
        sums.add(0, to_a);
        sums.add(1, to_scale);
        sums.add(2, to_share);
    }
    sums.finish();
}

// The rows of a bonus_norm call, and its parameters.
template <class T>
struct Bonus {
    const T *y, *gate, *r, *k, *v;
    const float *r_k, *weight, *bias;
};

// The sum over this thread's head of r * k * r_k.
template <class T>
__device__ inline float bonus_of(const HeadOf& head, const Bonus<T>& x, int64_t at, int column, bool in) {
    float own = 0.f;
    if (in) {
        const Quad<float> both = product(load(x.r + at), load(x.k + at)), weight = load(x.r_k + column);
        for (int q = 0; q < 4; ++q) own += both.at[q] * weight.at[q];
    }
    return head.sum(own);
}

template <class T>
__global__ void __launch_bounds__(1024) bonus_norm_out(Heads c, Bonus<T> x, T* out) {
    const int column = threadIdx.x * 4, n = c.n_heads * c.head_size;
    const bool in = column < n;
    const HeadOf head(c.head_size);
    const int first = blockIdx.x * c.strip;
    for (int row = first; row < min(c.n_rows, first + c.strip); ++row) {
        const int64_t at = int64_t(row) * n + column;
        const Quad<float> y = in ? load(x.y + at) : Quad<float>{};
        const HeadMoments m(head, y, float(c.eps));
        const float bonus = bonus_of(head, x, at, column, in);
        if (!in) continue;
        const Quad<float> w = load(x.weight + column), b = load(x.bias + column), v = load(x.v + at), gate = load(x.gate + at);
        Quad<float> result;
        for (int q = 0; q < 4; ++q)
            result.at[q] = ((y.at[q] - m.mean) * m.rstd * w.at[q] + b.at[q] + bonus * v.at[q]) * gate.at[q];
        store(out + at, result);
    }
}

template <class T>
__global__ void __launch_bounds__(1024)
    bonus_norm_back(Heads c, Bonus<T> x, const T* g_out, T* gy, T* g_gate, T* gr, T* gk, T* gv, float* partial) {
    const int column = threadIdx.x * 4, n = c.n_heads * c.head_size;
    const bool in = column < n;
    const HeadOf head(c.head_size);
    Sums<3, true> sums(partial + int64_t(blockIdx.x) * 3 * n + column, n, in);
    const int first = blockIdx.x * c.strip;
    for (int row = first; row < min(c.n_rows, first + c.strip); ++row) {
        const int64_t at = int64_t(row) * n + column;
        const Quad<float> y = in ? load(x.y + at) : Quad<float>{};
        const HeadMoments m(head, y, float(c.eps));
        const float bonus = bonus_of(head, x, at, column, in);
        Quad<float> g{}, normed{};
        float g_bonus = 0.f, sum = 0.f, along = 0.f;
        if (in) {
            const Quad<float> w = load(x.weight + column), b = load(x.bias + column), v = load(x.v + at), grad = load(g_out + at);
            Quad<float> to_gate, to_v;
            for (int q = 0; q < 4; ++q) {
                normed.at[q] = (y.at[q] - m.mean) * m.rstd;
                to_gate.at[q] = grad.at[q] * (normed.at[q] * w.at[q] + b.at[q] + bonus * v.at[q]);
            }
            store(g_gate + at, to_gate);
            g = product(grad, load(x.gate + at));
            for (int q = 0; q < 4; ++q) {
                to_v.at[q] = g.at[q] * bonus;
                g_bonus += g.at[q] * v.at[q];
            }
            store(gv + at, to_v);
            sums.add(1, product(g, normed));
            sums.add(2, g);
            g = product(g, w);
            for (int q = 0; q < 4; ++q) {
                sum += g.at[q];
                along += g.at[q] * normed.at[q];
            }
        }
        g_bonus = head.sum(g_bonus);
        sum = head.mean(sum);
        along = head.mean(along);
        if (!in) continue;
        for (int q = 0; q < 4; ++q) g.at[q] = m.rstd * (g.at[q] - sum - normed.at[q] * along);
        store(gy + at, g);
        const Quad<float> r = load(x.r + at), k = load(x.k + at), weight = load(x.r_k + column);
        Quad<float> to_r, to_k, to_weight;
        for (int q = 0; q < 4; ++q) {
            to_r.at[q] = g_bonus * k.at[q] * weight.at[q];
            to_k.at[q] = g_bonus * r.at[q] * weight.at[q];
            to_weight.at[q] = g_bonus * r.at[q] * k.at[q];
        }
        store(gr + at, to_r);
        store(gk + at, to_k);
        sums.add(0, to_weight);
    }
    sums.finish();
}

template <class T>
__global__ void __launch_bounds__(1024) blend_out(Heads c, const T* own, const T* first, const T* depth, const float* v0, T* out) {
    const int column = threadIdx.x * 4, n = c.n_heads * c.head_size, start = blockIdx.x * c.strip;
    if (column >= n) return;
    for (int row = start; row < min(c.n_rows, start + c.strip); ++row) {
        const int64_t at = int64_t(row) * n + column;
        const Quad<float> s = opened(load(v0 + column), load(depth + at)), other = load(first + at);
        Quad<float> result = load(own + at);
        for (int q = 0; q < 4; ++q) result.at[q] += (other.at[q] - result.at[q]) * s.at[q];
        store(out + at, result);
    }
}

template <class T>
__global__ void __launch_bounds__(1024) blend_back(Heads c, const T* own, const T* first, const T* depth, const float* v0, const T* g,
                                                   T* g_own, T* g_first, T* g_depth, float* partial) {
    const int column = threadIdx.x * 4, n = c.n_heads * c.head_size, start = blockIdx.x * c.strip;
    if (column >= n) return;
    Sums<1, true> sums(partial + int64_t(blockIdx.x) * n + column, n, true);
    for (int row = start; row < min(c.n_rows, start + c.strip); ++row) {
        const int64_t at = int64_t(row) * n + column;
        const Quad<float> s = opened(load(v0 + column), load(depth + at)), other = load(first + at), value = load(own + at), grad = load(g + at);
        Quad<float> to_own, to_first, to_depth;
        for (int q = 0; q < 4; ++q) {
            to_own.at[q] = grad.at[q] * (1.f - s.at[q]);
            to_first.at[q] = grad.at[q] * s.at[q];
            to_depth.at[q] = to_first.at[q] * (other.at[q] - value.at[q]) * (1.f - s.at[q]);
        }
        store(g_own + at, to_own);
        store(g_first + at, to_first);
        store(g_depth + at, to_depth);
        sums.add(0, to_depth);
    }
    sums.finish();
}

constexpr float kLeastLogW = -0.60653065971263342360f;  // -exp(-1/2)

template <class T>
__global__ void __launch_bounds__(1024) log_decay_out(Heads c, const T* x, const float* w0, float* log_w) {
    const int column = threadIdx.x * 4, n = c.n_heads * c.head_size, start = blockIdx.x * c.strip;
    if (column >= n) return;
    for (int row = start; row < min(c.n_rows, start + c.strip); ++row) {
        const int64_t at = int64_t(row) * n + column;
        Quad<float> result = opened(load(w0 + column), load(x + at));
        for (int q = 0; q < 4; ++q) result.at[q] *= kLeastLogW;
        store(log_w + at, result);
    }
}

template <class T>
__global__ void __launch_bounds__(1024) log_decay_back(Heads c, const float* log_w, const float* g, T* gx, float* partial) {
    const int column = threadIdx.x * 4, n = c.n_heads * c.head_size, start = blockIdx.x * c.strip;
    if (column >= n) return;
    Sums<1, true> sums(partial + int64_t(blockIdx.x) * n + column, n, true);
    for (int row = start; row < min(c.n_rows, start + c.strip); ++row) {
        const int64_t at = int64_t(row) * n + column;
        const Quad<float> value = load(log_w + at);
        Quad<float> grad = load(g + at);
        for (int q = 0; q < 4; ++q) grad.at[q] *= value.at[q] * (1.f - value.at[q] * (1.f / kLeastLogW));
        store(gx + at, grad);
        sums.add(0, grad);
    }
    sums.finish();
}

// A kernel over strips of rows, and where it leaves partial sums of n_vectors parameters' gradients, their total.
template <class... Parameters, class... Arguments>
cudaError_t over_strips(const Heads& c, void (*kernel)(Heads, Parameters...), Arguments... arguments) {
    return launch(kernel, n_strips(c.n_rows, c.strip), threads_for(c.n_heads * c.head_size), stream_of(c), c, Parameters(arguments)...);
}

cudaError_t totals(cudaError_t error, const Heads& c, int n_vectors, const void* partial, void* out) {
    const int width = n_vectors * c.n_heads * c.head_size;
    if (error != cudaSuccess) return error;
    return total(stream_of(c), static_cast<const float*>(partial), n_strips(c.n_rows, c.strip), width, static_cast<float*>(out));
}

const float* floats(const void* x) { return static_cast<const float*>(x); }

template <class T>
Shares<T> shares_of(const Rows& c, const void* own, const void* before, const void* adds, const void* const* mixing,
                    const void* const* g_mixed) {
    Shares<T> t{static_cast<const T*>(own), static_cast<const T*>(before), static_cast<const T*>(adds), {}, {}};
    for (int m = 0; m < c.n_mixes; ++m) {
        t.mixing[m] = floats(mixing[m]);
        t.g_mixed[m] = g_mixed == nullptr ? nullptr : static_cast<const T*>(g_mixed[m]);
    }
    return t;
}

template <class T>
Bonus<T> bonus_call(const void* y, const void* gate, const void* r, const void* k, const void* v, const void* r_k, const void* weight,
                    const void* bias) {
    return {static_cast<const T*>(y), static_cast<const T*>(gate), static_cast<const T*>(r), static_cast<const T*>(k),
            static_cast<const T*>(v), floats(r_k), floats(weight), floats(bias)};
}

}  // namespace

extern "C" int token_mixes_forward(const Rows* c, const void* own, const void* before, const void* adds, const void* const* mixing,
                                   void* mixed) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        if (c->n_mixes != kTokenMixes) return cudaErrorInvalidConfiguration;
        const auto t = shares_of<T>(*c, own, before, adds, mixing, nullptr);
        const int threads = threads_for(c->n_channels);
        const auto kernel = threads <= kFewThreads ? token_mixes_out<T, kFewThreads> : token_mixes_out<T, kManyThreads<T>>;
        return launch(kernel, n_strips(c->n_rows, c->strip), threads, stream_of(*c), *c, t, static_cast<T*>(mixed));
    });
}

extern "C" int token_mixes_backward(const Rows* c, const void* own, const void* before, const void* adds, const void* const* mixing,
                                    const void* const* g_mixed, void* g_own, void* g_before, void* g_adds, void* partial,
                                    void* g_parameters) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        if (c->n_mixes != kTokenMixes) return cudaErrorInvalidConfiguration;
        const auto t = shares_of<T>(*c, own, before, adds, mixing, g_mixed);
        const int threads = threads_for(c->n_channels), n_parts = n_strips(c->n_rows, c->strip), width = kTokenMixes * c->n_channels;
        const auto kernel = threads <= kFewThreads ? token_mixes_back<T, kFewThreads> : token_mixes_back<T, kManyThreads<T>>;
        const cudaError_t error = launch(kernel, n_parts, threads, stream_of(*c), *c, t, static_cast<T*>(g_own),
                                         static_cast<T*>(g_before), static_cast<T*>(g_adds), static_cast<float*>(partial));
        if (error != cudaSuccess) return error;
        return total(stream_of(*c), static_cast<const float*>(partial), n_parts, width, static_cast<float*>(g_parameters));
    });
}

extern "C" int delta_keys_forward(const Heads* c, const void* k, const void* a, const void* a0, const void* k_k, const void* k_a, void* key,
                                  void* taken, void* put_back) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        return over_strips(*c, delta_keys_out<T>, static_cast<const T*>(k), static_cast<const T*>(a), floats(a0), floats(k_k), floats(k_a),
                           static_cast<T*>(key), static_cast<T*>(taken), static_cast<T*>(put_back));
    });
}

extern "C" int delta_keys_backward(const Heads* c, const void* k, const void* a, const void* a0, const void* k_k, const void* k_a,
                                   const void* g_key, const void* g_taken, const void* g_put_back, void* gk, void* ga, void* partial,
                                   void* g_parameters) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        const cudaError_t error = over_strips(
            *c, delta_keys_back<T>, static_cast<const T*>(k), static_cast<const T*>(a), floats(a0), floats(k_k), floats(k_a),
            static_cast<const T*>(g_key), static_cast<const T*>(g_taken), static_cast<const T*>(g_put_back), static_cast<T*>(gk),
            static_cast<T*>(ga), static_cast<float*>(partial));
        return totals(error, *c, 3, partial, g_parameters);
    });
}

extern "C" int bonus_norm_forward(const Heads* c, const void* y, const void* gate, const void* r, const void* k, const void* v,
                                  const void* r_k, const void* weight, const void* bias, void* out) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        return over_strips(*c, bonus_norm_out<T>, bonus_call<T>(y, gate, r, k, v, r_k, weight, bias), static_cast<T*>(out));
    });
}

extern "C" int bonus_norm_backward(const Heads* c, const void* y, const void* gate, const void* r, const void* k, const void* v,
                                   const void* r_k, const void* weight, const void* bias, const void* g_out, void* gy, void* g_gate, void* gr,
                                   void* gk, void* gv, void* partial, void* g_parameters) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        const cudaError_t error =
            over_strips(*c, bonus_norm_back<T>, bonus_call<T>(y, gate, r, k, v, r_k, weight, bias), static_cast<const T*>(g_out),
                        static_cast<T*>(gy), static_cast<T*>(g_gate), static_cast<T*>(gr), static_cast<T*>(gk), static_cast<T*>(gv),
                        static_cast<float*>(partial));
        return totals(error, *c, 3, partial, g_parameters);
    });
}

extern "C" int blend_forward(const Heads* c, const void* own, const void* first, const void* depth, const void* v0, void* out) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        return over_strips(*c, blend_out<T>, static_cast<const T*>(own), static_cast<const T*>(first), static_cast<const T*>(depth),
                           floats(v0), static_cast<T*>(out));
    });
}

extern "C" int blend_backward(const Heads* c, const void* own, const void* first, const void* depth, const void* v0, const void* g,
                              void* g_own, void* g_first, void* g_depth, void* partial, void* g_parameters) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        const cudaError_t error =
            over_strips(*c, blend_back<T>, static_cast<const T*>(own), static_cast<const T*>(first), static_cast<const T*>(depth),
                        floats(v0), static_cast<const T*>(g), static_cast<T*>(g_own), static_cast<T*>(g_first), static_cast<T*>(g_depth),
                        static_cast<float*>(partial));
        return totals(error, *c, 1, partial, g_parameters);
    });
}

extern "C" int log_decay_forward(const Heads* c, const void* x, const void* w0, void* log_w) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        return over_strips(*c, log_decay_out<T>, static_cast<const T*>(x), floats(w0), static_cast<float*>(log_w));
    });
}

extern "C" int log_decay_backward(const Heads* c, const void* log_w, const void* g, void* gx, void* partial, void* g_parameters) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        const cudaError_t error =
            over_strips(*c, log_decay_back<T>, floats(log_w), floats(g), static_cast<T*>(gx), static_cast<float*>(partial));
        return totals(error, *c, 1, partial, g_parameters);
    });
}
