// What RWKV-6 and RWKV-7 have of their own between their matrix products, for CPUs; a part of fused_cpu.cpp.
#pragma once

namespace {

// f(row, sums, scratch) for all rows; sums [n_vectors, C]: what the row's strip adds to the gradients of parameters, scratch: 2 C numbers.
template <class R, class F>
void over_strips(const Heads& c, int n_vectors, R* partial, R* g_parameters, F f) {
    const int n = c.n_heads * c.head_size, width = n_vectors * n;
#pragma omp parallel num_threads(c.where.n_threads)
    {
        std::vector<R> scratch(2 * n);
#pragma omp for schedule(dynamic)
        for (int strip = 0; strip < n_strips(c.n_rows, c.strip); strip++) {
            R* sums = partial + int64_t(strip) * width;
            std::memset(sums, 0, sizeof(R) * width);
            for (int row = strip * c.strip; row < std::min(c.n_rows, (strip + 1) * c.strip); row++) f(row, sums, scratch.data());
        }
    }
    add_up(partial, n_strips(c.n_rows, c.strip), width, g_parameters);
}

template <class F>
void over_rows(const Heads& c, F f) {
#pragma omp parallel for schedule(static) num_threads(c.where.n_threads)
    for (int row = 0; row < c.n_rows; row++) f(row);
}

template <class T> struct TokenMixes {
    using R = Real<T>;

    static void forward(const Rows& c, const T* own, const T* before, const T* adds, const R* const* mixing, T* mixed) {
        const int n = c.n_channels;
#pragma omp parallel for schedule(static) num_threads(c.where.n_threads)
        for (int row = 0; row < c.n_rows; row++) {
            const T *a = own + int64_t(row) * n, *b = before + int64_t(row) * n;
            for (int m = 0; m < c.n_mixes; m++) {
                const int64_t at = (int64_t(m) * c.n_rows + row) * n;
                const R* mix = mixing[m];
#pragma omp simd
                for (int i = 0; i < n; i++)
                    mixed[at + i] = narrow<T>(wide(a[i]) + (wide(b[i]) - wide(a[i])) * (mix[i] + wide(adds[at + i])));
            }
        }
    }

    static void backward(const Rows& c, const T* own, const T* before, const T* adds, const R* const* mixing, const T* const* g_mixed,
                         T* g_own, T* g_before, T* g_adds, R* partial, R* g_parameters) {
        const int n = c.n_channels, width = c.n_mixes * n;
#pragma omp parallel num_threads(c.where.n_threads)
        {
            std::vector<R> of_own(n), of_before(n);
#pragma omp for schedule(dynamic)
            for (int strip = 0; strip < n_strips(c.n_rows, c.strip); strip++) {
                R* sum = partial + int64_t(strip) * width;
                std::memset(sum, 0, sizeof(R) * width);
                for (int row = strip * c.strip; row < std::min(c.n_rows, (strip + 1) * c.strip); row++) {
                    const T *a = own + int64_t(row) * n, *b = before + int64_t(row) * n;
                    R *to_own = of_own.data(), *to_before = of_before.data();
                    std::memset(to_own, 0, sizeof(R) * n);
                    std::memset(to_before, 0, sizeof(R) * n);
                    for (int m = 0; m < c.n_mixes; m++) {
                        const int64_t at = (int64_t(m) * c.n_rows + row) * n;
                        if (!g_mixed[m]) {
                            for (int i = 0; i < n; i++) g_adds[at + i] = narrow<T>(0);
                            continue;
                        }
                        const T* from = g_mixed[m] + int64_t(row) * n;
                        const R* mix = mixing[m];
                        R* g_mix = sum + int64_t(m) * n;
#pragma omp simd
                        for (int i = 0; i < n; i++) {
                            const R grad = wide(from[i]), share = mix[i] + wide(adds[at + i]), along = grad * (wide(b[i]) - wide(a[i]));
                            to_own[i] += grad - grad * share;
                            to_before[i] += grad * share;
                            g_adds[at + i] = narrow<T>(along);
                            g_mix[i] += along;
                        }
                    }
                    const int64_t at = int64_t(row) * n;
                    for (int i = 0; i < n; i++) g_own[at + i] = narrow<T>(to_own[i]), g_before[at + i] = narrow<T>(to_before[i]);
                }
            }
        }
        add_up(partial, n_strips(c.n_rows, c.strip), width, g_parameters);
    }
};

template <class T> struct DeltaKeys {
    using R = Real<T>;

    // 1 / the length of a head's k * k_k, and whether that is long enough to be a length at all.
    struct Length { R inverse; bool counts; };

    static Length length_of(const T* k, const R* k_k, int size, R eps) {
        R squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int i = 0; i < size; i++) squares += wide(k[i]) * k_k[i] * wide(k[i]) * k_k[i];
        const R length = std::sqrt(squares);
        return {R(1) / (length < eps ? eps : length), length > eps};
    }

    static void forward(const Heads& c, const T* k, const T* a, const R* a0, const R* k_k, const R* k_a, T* key, T* taken, T* put_back) {
        const int size = c.head_size, n = c.n_heads * size;
        over_rows(c, [=](int row) {
            for (int start = 0; start < n; start += size) {
                const int64_t at = int64_t(row) * n + start;
                const R inverse = length_of(k + at, k_k + start, size, R(c.eps)).inverse;
#pragma omp simd
                for (int i = 0; i < size; i++) {
                    const R own = wide(k[at + i]), rate = sigmoid(a0[start + i] + wide(a[at + i]));
                    const R kk = own * k_k[start + i] * inverse;
                    key[at + i] = narrow<T>(own * (R(1) + (rate - R(1)) * k_a[start + i]));
                    taken[at + i] = narrow<T>(-kk);
                    put_back[at + i] = narrow<T>(kk * rate);
                }
            }
        });
    }

    static void backward(const Heads& c, const T* k, const T* a, const R* a0, const R* k_k, const R* k_a, const T* g_key, const T* g_taken,
                         const T* g_put_back, T* gk, T* ga, R* partial, R* g_parameters) {
        const int size = c.head_size, n = c.n_heads * size;
        over_strips(c, 3, partial, g_parameters, [=](int row, R* sums, R* g_kk) {
            for (int start = 0; start < n; start += size) {
                const int64_t at = int64_t(row) * n + start;
                const Length length = length_of(k + at, k_k + start, size, R(c.eps));
                R along = 0;
#pragma omp simd reduction(+ : along)
                for (int i = 0; i < size; i++) {
                    const R rate = sigmoid(a0[start + i] + wide(a[at + i]));
                    g_kk[i] = wide(g_put_back[at + i]) * rate - wide(g_taken[at + i]);
                    along += g_kk[i] * wide(k[at + i]) * k_k[start + i] * length.inverse;
                }
                along = length.counts ? along : R(0);
                R *g_a0 = sums + start, *g_k_k = sums + n + start, *g_k_a = sums + 2 * n + start;
#pragma omp simd
                for (int i = 0; i < size; i++) {
                    const R own = wide(k[at + i]), rate = sigmoid(a0[start + i] + wide(a[at + i])), grad = wide(g_key[at + i]);
                    const R kk = own * k_k[start + i] * length.inverse, g_unit = (g_kk[i] - kk * along) * length.inverse;
                    const R g_rate = (wide(g_put_back[at + i]) * kk + grad * own * k_a[start + i]) * rate * (R(1) - rate);
                    gk[at + i] = narrow<T>(grad * (R(1) + (rate - R(1)) * k_a[start + i]) + g_unit * k_k[start + i]);
                    ga[at + i] = narrow<T>(g_rate);
                    g_a0[i] += g_rate;
                    g_k_k[i] += g_unit * own;
                    g_k_a[i] += grad * own * (rate - R(1));
                }
            }
        });
    }
};

template <class T> struct BonusNorm {
    using R = Real<T>;

    // The rows that a call has, and its parameters.
    struct Given { const T *y, *gate, *r, *k, *v; const R *r_k, *weight, *bias; };

    static R bonus_of(const Given& x, int64_t at, int start, int size) {
        R bonus = 0;
#pragma omp simd reduction(+ : bonus)
        for (int i = 0; i < size; i++) bonus += wide(x.r[at + i]) * wide(x.k[at + i]) * x.r_k[start + i];
        return bonus;
    }

    static void widened(const T* from, int size, R* to) {
        for (int i = 0; i < size; i++) to[i] = wide(from[i]);
    }

    static void forward(const Heads& c, Given x, T* out) {
        const int size = c.head_size, n = c.n_heads * size;
#pragma omp parallel num_threads(c.where.n_threads)
        {
            std::vector<R> values(size);
#pragma omp for schedule(static)
            for (int row = 0; row < c.n_rows; row++) {
                for (int start = 0; start < n; start += size) {
                    const int64_t at = int64_t(row) * n + start;
                    R* y = values.data();
                    widened(x.y + at, size, y);
                    const auto m = moments_of(y, size, R(c.eps));
                    const R bonus = bonus_of(x, at, start, size);
#pragma omp simd
                    for (int i = 0; i < size; i++) {
                        const R normed = (y[i] - m.mean) * m.rstd * x.weight[start + i] + x.bias[start + i];
                        out[at + i] = narrow<T>((normed + bonus * wide(x.v[at + i])) * wide(x.gate[at + i]));
                    }
                }
            }
        }
    }

    static void backward(const Heads& c, Given x, const T* g_out, T* gy, T* g_gate, T* gr, T* gk, T* gv, R* partial, R* g_parameters) {
        const int size = c.head_size, n = c.n_heads * size;
        over_strips(c, 3, partial, g_parameters, [=](int row, R* sums, R* scratch) {
            R *y = scratch, *g = scratch + size;
            for (int start = 0; start < n; start += size) {
                const int64_t at = int64_t(row) * n + start;
                widened(x.y + at, size, y);
                const auto m = moments_of(y, size, R(c.eps));
                const R bonus = bonus_of(x, at, start, size);
                R g_bonus = 0;
#pragma omp simd reduction(+ : g_bonus)
                for (int i = 0; i < size; i++) {
                    const R grad = wide(g_out[at + i]), v = wide(x.v[at + i]);
                    const R normed = (y[i] - m.mean) * m.rstd * x.weight[start + i] + x.bias[start + i];
                    g_gate[at + i] = narrow<T>(grad * (normed + bonus * v));
                    g[i] = grad * wide(x.gate[at + i]);
                    gv[at + i] = narrow<T>(g[i] * bonus);
                    g_bonus += g[i] * v;
                }
                R* g_r_k = sums + start;
#pragma omp simd
                for (int i = 0; i < size; i++) {
                    const R r = wide(x.r[at + i]), k = wide(x.k[at + i]);
                    gr[at + i] = narrow<T>(g_bonus * k * x.r_k[start + i]);
                    gk[at + i] = narrow<T>(g_bonus * r * x.r_k[start + i]);
                    g_r_k[i] += g_bonus * r * k;
                }
                norm_backward(y, m, x.weight + start, size, g, sums + n + start, sums + 2 * n + start);
                for (int i = 0; i < size; i++) gy[at + i] = narrow<T>(g[i]);
            }
        });
    }
};

template <class T> struct Blend {
    using R = Real<T>;

    static void forward(const Heads& c, const T* own, const T* first, const T* depth, const R* v0, T* out) {
        const int n = c.n_heads * c.head_size;
        over_rows(c, [=](int row) {
            const int64_t at = int64_t(row) * n;
#pragma omp simd
            for (int i = 0; i < n; i++) {
                const R value = wide(own[at + i]);
                out[at + i] = narrow<T>(value + (wide(first[at + i]) - value) * sigmoid(v0[i] + wide(depth[at + i])));
            }
        });
    }

    static void backward(const Heads& c, const T* own, const T* first, const T* depth, const R* v0, const T* g, T* g_own, T* g_first,
                         T* g_depth, R* partial, R* g_parameters) {
        const int n = c.n_heads * c.head_size;
        over_strips(c, 1, partial, g_parameters, [=](int row, R* g_v0, R*) {
            const int64_t at = int64_t(row) * n;
#pragma omp simd
            for (int i = 0; i < n; i++) {
                const R s = sigmoid(v0[i] + wide(depth[at + i])), grad = wide(g[at + i]);
                const R inner = grad * (wide(first[at + i]) - wide(own[at + i])) * s * (R(1) - s);
                g_own[at + i] = narrow<T>(grad * (R(1) - s));
                g_first[at + i] = narrow<T>(grad * s);
                g_depth[at + i] = narrow<T>(inner);
                g_v0[i] += inner;
            }
        });
    }
};

template <class T> struct LogDecay {
    using R = Real<T>;
    static constexpr R LEAST = R(-0.60653065971263342360);  // -exp(-1/2)

    static void forward(const Heads& c, const T* x, const R* w0, R* log_w) {
        const int n = c.n_heads * c.head_size;
        over_rows(c, [=](int row) {
            const int64_t at = int64_t(row) * n;
#pragma omp simd
            for (int i = 0; i < n; i++) log_w[at + i] = LEAST * sigmoid(w0[i] + wide(x[at + i]));
        });
    }

    static void backward(const Heads& c, const R* log_w, const R* g, T* gx, R* partial, R* g_parameters) {
        const int n = c.n_heads * c.head_size;
        over_strips(c, 1, partial, g_parameters, [=](int row, R* g_w0, R*) {
            const int64_t at = int64_t(row) * n;
#pragma omp simd
            for (int i = 0; i < n; i++) {
                const R inner = g[at + i] * log_w[at + i] * (R(1) - log_w[at + i] * (R(1) / LEAST));
                gx[at + i] = narrow<T>(inner);
                g_w0[i] += inner;
            }
        });
    }
};

}  // namespace

// Parameters, their gradients, partial sums and log w are fp32, or double for double.
extern "C" int token_mixes_forward(const Rows* c, const void* own, const void* before, const void* adds, const void* const* mixing,
                                   void* mixed) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        TokenMixes<T>::forward(*c, static_cast<const T*>(own), static_cast<const T*>(before), static_cast<const T*>(adds),
                               reinterpret_cast<const Real<T>* const*>(mixing), static_cast<T*>(mixed));
    });
    return 0;
}

extern "C" int token_mixes_backward(const Rows* c, const void* own, const void* before, const void* adds, const void* const* mixing,
                                    const void* const* g_mixed, void* g_own, void* g_before, void* g_adds, void* partial,
                                    void* g_parameters) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        TokenMixes<T>::backward(*c, static_cast<const T*>(own), static_cast<const T*>(before), static_cast<const T*>(adds),
                                reinterpret_cast<const R* const*>(mixing), reinterpret_cast<const T* const*>(g_mixed),
                                static_cast<T*>(g_own), static_cast<T*>(g_before), static_cast<T*>(g_adds), static_cast<R*>(partial),
                                static_cast<R*>(g_parameters));
    });
    return 0;
}

extern "C" int delta_keys_forward(const Heads* c, const void* k, const void* a, const void* a0, const void* k_k, const void* k_a, void* key,
                                  void* taken, void* put_back) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        DeltaKeys<T>::forward(*c, static_cast<const T*>(k), static_cast<const T*>(a), static_cast<const R*>(a0), static_cast<const R*>(k_k),
                              static_cast<const R*>(k_a), static_cast<T*>(key), static_cast<T*>(taken), static_cast<T*>(put_back));
    });
    return 0;
}

extern "C" int delta_keys_backward(const Heads* c, const void* k, const void* a, const void* a0, const void* k_k, const void* k_a,
                                   const void* g_key, const void* g_taken, const void* g_put_back, void* gk, void* ga, void* partial,
                                   void* g_parameters) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        DeltaKeys<T>::backward(*c, static_cast<const T*>(k), static_cast<const T*>(a), static_cast<const R*>(a0),
                               static_cast<const R*>(k_k), static_cast<const R*>(k_a), static_cast<const T*>(g_key),
                               static_cast<const T*>(g_taken), static_cast<const T*>(g_put_back), static_cast<T*>(gk), static_cast<T*>(ga),
                               static_cast<R*>(partial), static_cast<R*>(g_parameters));
    });
    return 0;
}

extern "C" int bonus_norm_forward(const Heads* c, const void* y, const void* gate, const void* r, const void* k, const void* v,
                                  const void* r_k, const void* weight, const void* bias, void* out) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        BonusNorm<T>::forward(*c,
                              {static_cast<const T*>(y), static_cast<const T*>(gate), static_cast<const T*>(r), static_cast<const T*>(k),
                               static_cast<const T*>(v), static_cast<const R*>(r_k), static_cast<const R*>(weight),
                               static_cast<const R*>(bias)},
                              static_cast<T*>(out));
    });
    return 0;
}

extern "C" int bonus_norm_backward(const Heads* c, const void* y, const void* gate, const void* r, const void* k, const void* v,
                                   const void* r_k, const void* weight, const void* bias, const void* g_out, void* gy, void* g_gate, void* gr,
                                   void* gk, void* gv, void* partial, void* g_parameters) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        BonusNorm<T>::backward(*c,
                               {static_cast<const T*>(y), static_cast<const T*>(gate), static_cast<const T*>(r), static_cast<const T*>(k),
                                static_cast<const T*>(v), static_cast<const R*>(r_k), static_cast<const R*>(weight),
                                static_cast<const R*>(bias)},
                               static_cast<const T*>(g_out), static_cast<T*>(gy), static_cast<T*>(g_gate), static_cast<T*>(gr),
                               static_cast<T*>(gk), static_cast<T*>(gv), static_cast<R*>(partial), static_cast<R*>(g_parameters));
    });
    return 0;
}

extern "C" int blend_forward(const Heads* c, const void* own, const void* first, const void* depth, const void* v0, void* out) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        Blend<T>::forward(*c, static_cast<const T*>(own), static_cast<const T*>(first), static_cast<const T*>(depth),
                          static_cast<const Real<T>*>(v0), static_cast<T*>(out));
    });
    return 0;
}

extern "C" int blend_backward(const Heads* c, const void* own, const void* first, const void* depth, const void* v0, const void* g,
                              void* g_own, void* g_first, void* g_depth, void* partial, void* g_parameters) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        Blend<T>::backward(*c, static_cast<const T*>(own), static_cast<const T*>(first), static_cast<const T*>(depth),
                           static_cast<const R*>(v0), static_cast<const T*>(g), static_cast<T*>(g_own), static_cast<T*>(g_first),
                           static_cast<T*>(g_depth), static_cast<R*>(partial), static_cast<R*>(g_parameters));
    });
    return 0;
}

extern "C" int log_decay_forward(const Heads* c, const void* x, const void* w0, void* log_w) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        LogDecay<T>::forward(*c, static_cast<const T*>(x), static_cast<const R*>(w0), static_cast<R*>(log_w));
    });
    return 0;
}

extern "C" int log_decay_backward(const Heads* c, const void* log_w, const void* g, void* gx, void* partial, void* g_parameters) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        LogDecay<T>::backward(*c, static_cast<const R*>(log_w), static_cast<const R*>(g), static_cast<T*>(gx), static_cast<R*>(partial),
                              static_cast<R*>(g_parameters));
    });
    return 0;
}
