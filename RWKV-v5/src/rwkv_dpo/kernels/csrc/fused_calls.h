// The arguments of a block's functions, for CPUs and for GPUs alike. Mirrored field by field in fused/compiled.py. In no anonymous namespace:
// nvcc hides every function with a parameter of such a type.
#pragma once

#include <cstdint>

struct Where {
    void* stream;  // of CUDA
    int32_t n_threads, dtype;
};

struct Rows {
    Where where;
    int32_t n_rows, n_channels, n_roots, n_segments, n_mixes, strip;
    int32_t of_before;  // whether mixes say how much of the row before there is, and not of the row itself
    double eps;
    const int32_t* before;      // [n_rows] the row before each; n_rows + i: what root i was handed
    const int32_t* uses_start;  // [n_rows + n_roots + 1] into uses
    const int32_t* uses;        // rows that have this one before them; n_rows + i: segment i ends with it
    const int64_t* last_rows;   // [n_segments]
};

struct Heads {
    Where where;
    int32_t n_rows, n_heads, head_size, strip;
    double eps;
};

struct Flat {
    Where where;
    int64_t n;
};

inline int n_strips(int n_rows, int strip) { return (n_rows + strip - 1) / strip; }
