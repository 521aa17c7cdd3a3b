// What a block does between its matrix products, for CPUs: each function reads its inputs and writes its outputs once. The contract is in
// rwkv_dpo/kernels/fused/__init__.py.
//
// Arithmetic is fp32 for fp32, bf16 and fp16, and double for double. Norms are rounded to the tensors' type before they are mixed, so
// that a token counts alike whether it comes from this call or was handed in. Rows are worked on in strips of a fixed size, and what is
// summed over rows is summed strip by strip: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "floats.h"
#include "fused_calls.h"

namespace {

constexpr int64_t PART = 1 << 15;  // numbers of an elementwise function that a thread takes at once

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

// Read as a number to calculate with, and back.
inline float wide(float x) { return x; }
inline double wide(double x) { return x; }
inline float wide(Bf16 x) { return from_bf16(x.bits); }
inline float wide(Fp16 x) { return from_fp16(x.bits); }

template <class T> T narrow(typename std::conditional<std::is_same<T, double>::value, double, float>::type x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline double narrow<double>(double x) { return x; }
template <> inline Bf16 narrow<Bf16>(float x) { return {to_bf16(x)}; }
template <> inline Fp16 narrow<Fp16>(float x) { return {to_fp16(x)}; }

template <class T> using Real = decltype(wide(T()));

// A vector loop, where std::exp would be a call a number: 2^k times a polynomial (Cephes' expf: within 1e-7 of the value).
inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float k = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // the nearest whole number: the addition drops what is behind the point
    const float f = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    return (p * f * f + f + 1.0f) * float_of(uint32_t(int32_t(k) + 127) << 23);
}
inline double exponential(double x) { return std::exp(x); }

template <class R> inline R sigmoid(R x) { return R(1) / (R(1) + exponential(-x)); }

template <class T> const T* row_of(const void* tensor, int64_t row, int n) { return static_cast<const T*>(tensor) + row * n; }
template <class T> T* row_of(void* tensor, int64_t row, int n) { return static_cast<T*>(tensor) + row * n; }

// Mean and 1 / standard deviation of n numbers.
template <class R> struct Moments { R mean, rstd; };

template <class R> Moments<R> moments_of(const R* x, int n, R eps) {
    R sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i];
    const R mean = sum / n;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    return {mean, R(1) / std::sqrt(squares / n + eps)};
}

// Gradients of weight and bias of a norm grow by one group's, and g [n], the gradient of its output, becomes that of its input.
template <class R>
void norm_backward(const R* x, Moments<R> m, const R* weight, int n, R* g, R* g_weight, R* g_bias) {
    R sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
    for (int i = 0; i < n; i++) {
        const R normed = (x[i] - m.mean) * m.rstd;
        g_weight[i] += g[i] * normed;
        g_bias[i] += g[i];
        g[i] *= weight[i];
        sum += g[i];
        along += g[i] * normed;
    }
    sum /= n;
    along /= n;
#pragma omp simd
    for (int i = 0; i < n; i++) g[i] = m.rstd * (g[i] - sum - (x[i] - m.mean) * m.rstd * along);
}

// out [width] is the sum of partial [n_parts, width], in their order.
template <class R> void add_up(const R* partial, int n_parts, int width, R* out) {
    std::memset(out, 0, sizeof(R) * width);
    for (int part = 0; part < n_parts; part++)
        for (int i = 0; i < width; i++) out[i] += partial[int64_t(part) * width + i];
}

// A token as its neighbours see it: its row after the norm, or what was handed in.
template <class T> struct Token {
    using R = Real<T>;
    int64_t row = -1;
    Moments<R> moments{};
    std::vector<R> x, normed;

    explicit Token(int n) : x(n), normed(n) {}

    void set(const Rows& c, int64_t number, const void* rows, const void* handed_in, const R* weight, const R* bias) {
        const int n = c.n_channels;
        row = number;
        if (number >= c.n_rows) {
            const T* given = handed_in ? row_of<T>(handed_in, number - c.n_rows, n) : nullptr;
            for (int i = 0; i < n; i++) normed[i] = given ? wide(given[i]) : R(0);
            return;
        }
        const T* from = row_of<T>(rows, number, n);
        for (int i = 0; i < n; i++) x[i] = wide(from[i]);
        moments = moments_of(x.data(), n, R(c.eps));
        R *to = normed.data(), *values = x.data();
        const R mean = moments.mean, rstd = moments.rstd;
#pragma omp simd
        for (int i = 0; i < n; i++) to[i] = wide(narrow<T>((values[i] - mean) * rstd * weight[i] + bias[i]));
    }
};

template <class T> struct Mixes {
    using R = Real<T>;

    static void forward(const Rows& c, const void* x, const void* handed_in, const R* weight, const R* bias, const R* const* mixing,
                        void* mixed, void* last) {
        const int n = c.n_channels;
#pragma omp parallel num_threads(c.where.n_threads)
        {
            Token<T> token(n), before(n);
#pragma omp for schedule(dynamic)
            for (int strip = 0; strip < n_strips(c.n_rows, c.strip); strip++) {
                before.row = -1;
                for (int row = strip * c.strip; row < std::min(c.n_rows, (strip + 1) * c.strip); row++) {
                    token.set(c, row, x, handed_in, weight, bias);
                    if (before.row != c.before[row]) before.set(c, c.before[row], x, handed_in, weight, bias);
                    for (int m = 0; m < c.n_mixes; m++) {
                        T* out = row_of<T>(mixed, int64_t(m) * c.n_rows + row, n);
                        const R* mix = mixing[m];
                        // Mixes that say how much of the row before: the other way round.
                        const R *a = (c.of_before ? before : token).normed.data(), *b = (c.of_before ? token : before).normed.data();
#pragma omp simd
                        for (int i = 0; i < n; i++) out[i] = narrow<T>(b[i] + (a[i] - b[i]) * mix[i]);
                    }
                    std::swap(token, before);
                }
            }
#pragma omp for schedule(dynamic)
            for (int segment = 0; segment < c.n_segments; segment++) {
                token.set(c, c.last_rows[segment], x, handed_in, weight, bias);
                T* out = row_of<T>(last, segment, n);
                for (int i = 0; i < n; i++) out[i] = narrow<T>(token.normed[i]);
            }
        }
    }

    // What the rows that use token `number` hand to it is added to g.
    static void gather(const Rows& c, int64_t number, const void* const* g_mixed, const void* g_last, const R* const* mixing,
                       int known_row, const R* known, R* g) {
        const int n = c.n_channels;
        for (int at = c.uses_start[number]; at < c.uses_start[number + 1]; at++) {
            const int use = c.uses[at];
            if (use == known_row) {
                for (int i = 0; i < n; i++) g[i] += known[i];
            } else if (use < c.n_rows) {
                for (int m = 0; m < c.n_mixes; m++) {
                    if (!g_mixed[m]) continue;
                    const T* from = row_of<T>(g_mixed[m], use, n);
                    const R *mix = mixing[m], all = c.of_before ? R(0) : R(1), sign = c.of_before ? R(1) : R(-1);
                    for (int i = 0; i < n; i++) g[i] += wide(from[i]) * (all + sign * mix[i]);
                }
            } else if (g_last) {
                const T* from = row_of<T>(g_last, use - c.n_rows, n);
                for (int i = 0; i < n; i++) g[i] += wide(from[i]);
            }
        }
    }

    static void backward(const Rows& c, const void* x, const void* handed_in, const R* weight, const R* bias, const R* const* mixing,
                         const void* const* g_mixed, const void* g_last, const void* g_past, void* gx, void* g_handed_in,
                         R* partial, R* g_parameters) {
        const int n = c.n_channels, width = (2 + c.n_mixes) * n;  // weight, bias, mixes
#pragma omp parallel num_threads(c.where.n_threads)
        {
            Token<T> token(n), before(n);
            std::vector<R> g(n), g_before(n);
#pragma omp for schedule(dynamic)
            for (int strip = 0; strip < n_strips(c.n_rows, c.strip); strip++) {
                R* sum = partial + int64_t(strip) * width;
                std::memset(sum, 0, sizeof(R) * width);
                int known_row = -1;  // whose g_before is at hand
                before.row = -1;
                for (int row = std::min(c.n_rows, (strip + 1) * c.strip) - 1; row >= strip * c.strip; row--) {
                    std::swap(token, before);
                    if (token.row != row) token.set(c, row, x, handed_in, weight, bias);
                    before.set(c, c.before[row], x, handed_in, weight, bias);
                    std::memset(g.data(), 0, sizeof(R) * n);
                    gather(c, row, g_mixed, g_last, mixing, known_row, g_before.data(), g.data());
                    std::memset(g_before.data(), 0, sizeof(R) * n);
                    for (int m = 0; m < c.n_mixes; m++) {
                        if (!g_mixed[m]) continue;
                        const T* from = row_of<T>(g_mixed[m], row, n);
                        const R* mix = mixing[m];
                        const R *a = (c.of_before ? before : token).normed.data(), *b = (c.of_before ? token : before).normed.data();
                        R *own = (c.of_before ? g_before : g).data(), *other = (c.of_before ? g : g_before).data();
                        R* g_mix = sum + (2 + m) * n;
#pragma omp simd
                        for (int i = 0; i < n; i++) {
                            const R value = wide(from[i]);
                            own[i] += value * mix[i];
                            other[i] += value - value * mix[i];
                            g_mix[i] += value * (a[i] - b[i]);
                        }
                    }
                    known_row = row;
                    norm_backward(token.x.data(), token.moments, weight, n, g.data(), sum, sum + n);
                    if (g_past) {
                        const T* past = row_of<T>(g_past, row, n);
                        for (int i = 0; i < n; i++) g[i] += wide(past[i]);
                    }
                    T* out = row_of<T>(gx, row, n);
                    for (int i = 0; i < n; i++) out[i] = narrow<T>(g[i]);
                }
            }
            if (g_handed_in) {
#pragma omp for schedule(dynamic)
                for (int root = 0; root < c.n_roots; root++) {
                    std::memset(g.data(), 0, sizeof(R) * n);
                    gather(c, c.n_rows + root, g_mixed, g_last, mixing, -1, nullptr, g.data());
                    T* out = row_of<T>(g_handed_in, root, n);
                    for (int i = 0; i < n; i++) out[i] = narrow<T>(g[i]);
                }
            }
        }
        add_up(partial, n_strips(c.n_rows, c.strip), width, g_parameters);
    }
};

template <class T> struct GatedNorm {
    using R = Real<T>;

    static void forward(const Heads& c, const void* y, const void* gate, const R* weight, const R* bias, void* out) {
        const int n = c.n_heads * c.head_size;
#pragma omp parallel num_threads(c.where.n_threads)
        {
            std::vector<R> x(n);
#pragma omp for schedule(static, c.strip)
            for (int row = 0; row < c.n_rows; row++) {
                const T *from = row_of<T>(y, row, n), *g = row_of<T>(gate, row, n);
                T* to = row_of<T>(out, row, n);
                for (int i = 0; i < n; i++) x[i] = wide(from[i]);
                for (int start = 0; start < n; start += c.head_size) {
                    const auto m = moments_of(x.data() + start, c.head_size, R(c.eps));
                    const R* values = x.data();
#pragma omp simd
                    for (int i = start; i < start + c.head_size; i++) {
                        const R z = wide(g[i]);
                        to[i] = narrow<T>(((values[i] - m.mean) * m.rstd * weight[i] + bias[i]) * z * sigmoid(z));
                    }
                }
            }
        }
    }

    static void backward(const Heads& c, const void* y, const void* gate, const R* weight, const R* bias, const void* g_out, void* gy,
                         void* g_gate, R* partial, R* g_parameters) {
        const int n = c.n_heads * c.head_size, size = c.head_size, width = 2 * n;
#pragma omp parallel num_threads(c.where.n_threads)
        {
            std::vector<R> x(n), g(n);
#pragma omp for schedule(dynamic)
            for (int strip = 0; strip < n_strips(c.n_rows, c.strip); strip++) {
                R* sum = partial + int64_t(strip) * width;
                std::memset(sum, 0, sizeof(R) * width);
                for (int row = strip * c.strip; row < std::min(c.n_rows, (strip + 1) * c.strip); row++) {
                    const T *from = row_of<T>(y, row, n), *gates = row_of<T>(gate, row, n), *grads = row_of<T>(g_out, row, n);
                    T *to = row_of<T>(gy, row, n), *to_gate = row_of<T>(g_gate, row, n);
                    for (int i = 0; i < n; i++) x[i] = wide(from[i]);
                    for (int start = 0; start < n; start += size) {
                        const auto m = moments_of(x.data() + start, size, R(c.eps));
                        R *values = x.data(), *own = g.data();
#pragma omp simd
                        for (int i = start; i < start + size; i++) {
                            const R z = wide(gates[i]), s = sigmoid(z), grad = wide(grads[i]);
                            const R normed = (values[i] - m.mean) * m.rstd * weight[i] + bias[i];
                            to_gate[i] = narrow<T>(grad * normed * s * (R(1) + z * (R(1) - s)));
                            own[i] = grad * z * s;
                        }
                        norm_backward(values + start, m, weight + start, size, own + start, sum + start, sum + n + start);
                    }
                    for (int i = 0; i < n; i++) to[i] = narrow<T>(g[i]);
                }
            }
        }
        add_up(partial, n_strips(c.n_rows, c.strip), width, g_parameters);
    }
};

// f(i) for all numbers of a tensor, or of several of one size.
template <class F> void for_each(const Flat& c, F f) {
#pragma omp parallel for schedule(static) num_threads(c.where.n_threads)
    for (int64_t start = 0; start < c.n; start += PART) f(start, std::min(c.n, start + PART));
}

template <class T> struct ReluSquared {
    static void forward(const Flat& c, const T* x, T* out) {
        for_each(c, [=](int64_t start, int64_t end) {
#pragma omp simd
            for (int64_t i = start; i < end; i++) {
                const Real<T> value = wide(x[i]), positive = value < 0 ? 0 : value;
                out[i] = narrow<T>(positive * positive);
            }
        });
    }
    static void backward(const Flat& c, const T* x, const T* g, T* gx) {
        for_each(c, [=](int64_t start, int64_t end) {
#pragma omp simd
            for (int64_t i = start; i < end; i++) {
                const Real<T> value = wide(x[i]), positive = value < 0 ? 0 : value;
                gx[i] = narrow<T>(2 * positive * wide(g[i]));
            }
        });
    }
};

template <class T> struct SigmoidGate {
    static void forward(const Flat& c, const T* gate, const T* value, T* out) {
        for_each(c, [=](int64_t start, int64_t end) {
#pragma omp simd
            for (int64_t i = start; i < end; i++) out[i] = narrow<T>(sigmoid(wide(gate[i])) * wide(value[i]));
        });
    }
    static void backward(const Flat& c, const T* gate, const T* value, const T* g, T* g_gate, T* g_value) {
        for_each(c, [=](int64_t start, int64_t end) {
#pragma omp simd
            for (int64_t i = start; i < end; i++) {
                const Real<T> s = sigmoid(wide(gate[i])), grad = wide(g[i]);
                g_gate[i] = narrow<T>(grad * wide(value[i]) * s * (1 - s));
                g_value[i] = narrow<T>(grad * s);
            }
        });
    }
};

// f with the type that a call's dtype stands for; the numbers are those of calls.py.
template <class F> void with_type(int dtype, F f) {
    switch (dtype) {
        case 0: return f(float());
        case 1: return f(Bf16());
        case 2: return f(Fp16());
        default: return f(double());
    }
}

}  // namespace

// Parameters, their gradients and partial sums of these are fp32, or double for double. Returns 0, as CUDA for success.
extern "C" int mixes_forward(const Rows* c, const void* x, const void* handed_in, const void* weight, const void* bias,
                              const void* const* mixing, void* mixed, void* last) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        Mixes<T>::forward(*c, x, handed_in, static_cast<const R*>(weight), static_cast<const R*>(bias),
                          reinterpret_cast<const R* const*>(mixing), mixed, last);
    });
    return 0;
}

extern "C" int mixes_backward(const Rows* c, const void* x, const void* handed_in, const void* weight, const void* bias,
                               const void* const* mixing, const void* const* g_mixed, const void* g_last, const void* g_past, void* gx,
                               void* g_handed_in, void* partial, void* g_parameters) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        Mixes<T>::backward(*c, x, handed_in, static_cast<const R*>(weight), static_cast<const R*>(bias),
                           reinterpret_cast<const R* const*>(mixing), g_mixed, g_last, g_past, gx, g_handed_in,
                           static_cast<R*>(partial), static_cast<R*>(g_parameters));
    });
    return 0;
}

extern "C" int gated_norm_forward(const Heads* c, const void* y, const void* gate, const void* weight, const void* bias, void* out) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        GatedNorm<T>::forward(*c, y, gate, static_cast<const R*>(weight), static_cast<const R*>(bias), out);
    });
    return 0;
}

extern "C" int gated_norm_backward(const Heads* c, const void* y, const void* gate, const void* weight, const void* bias,
                                    const void* g_out, void* gy, void* g_gate, void* partial,
                                   void* g_parameters) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        using R = Real<T>;
        GatedNorm<T>::backward(*c, y, gate, static_cast<const R*>(weight), static_cast<const R*>(bias), g_out, gy, g_gate,
                               static_cast<R*>(partial), static_cast<R*>(g_parameters));
    });
    return 0;
}

extern "C" int relu_squared_forward(const Flat* c, const void* x, void* out) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        ReluSquared<T>::forward(*c, static_cast<const T*>(x), static_cast<T*>(out));
    });
    return 0;
}

extern "C" int relu_squared_backward(const Flat* c, const void* x, const void* g, void* gx) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        ReluSquared<T>::backward(*c, static_cast<const T*>(x), static_cast<const T*>(g), static_cast<T*>(gx));
    });
    return 0;
}

extern "C" int sigmoid_gate_forward(const Flat* c, const void* gate, const void* value, void* out) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        SigmoidGate<T>::forward(*c, static_cast<const T*>(gate), static_cast<const T*>(value), static_cast<T*>(out));
    });
    return 0;
}

extern "C" int sigmoid_gate_backward(const Flat* c, const void* gate, const void* value, const void* g, void* g_gate, void* g_value) {
    with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        SigmoidGate<T>::backward(*c, static_cast<const T*>(gate), static_cast<const T*>(value), static_cast<const T*>(g),
                                 static_cast<T*>(g_gate), static_cast<T*>(g_value));
    });
    return 0;
}

extern "C" const char* kernels_error(int) { return "no error"; }

#include "fused_newer.h"
