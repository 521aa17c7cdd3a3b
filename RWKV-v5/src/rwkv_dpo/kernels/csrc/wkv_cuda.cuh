// What the recurrences on NVIDIA GPUs share: how Python says where tokens lie, and how a pass is found for the rows' type and head size.
#pragma once

#include <cstdint>

#include "quads.cuh"

// A sequence is cut into segments, all of one length but the last one.
struct Segment {
    int first_row, length;
};

// Mirrors `Layout` in kernels/cuda_library.py. In no anonymous namespace: nvcc hides every function with a parameter of such a type, extern
// "C" or not.
struct Layout {
    int dtype, n_sequences, n_segments, n_heads, head_size;
    const Segment* segments;   // [n_segments], the segments of a sequence side by side
    const int* first_segment;  // [n_sequences + 1]
    cudaStream_t stream;
};

namespace {

// Pass<T, NP>::run for the first of the head sizes NP, which rise, that has room for the true one.
template <template <class, int> class Pass, class T, int NP, int... larger, class... Arguments>
cudaError_t for_head_size(const Layout& layout, Arguments... arguments) {
    if constexpr (sizeof...(larger) > 0)
        if (layout.head_size > NP) return for_head_size<Pass, T, larger...>(layout, arguments...);
    return Pass<T, NP>::run(layout, arguments...);
}

template <template <class, int> class Pass, int... sizes, class... Arguments>
int dispatch(const Layout& layout, Arguments... arguments) {
    if (layout.dtype == 0) return for_head_size<Pass, float, sizes...>(layout, arguments...);
    if (layout.dtype == 1) return for_head_size<Pass, __nv_bfloat16, sizes...>(layout, arguments...);
    return for_head_size<Pass, __half, sizes...>(layout, arguments...);
}

}  // namespace
