// write_kv, rotary_write_kv and copy_pages, one launch each. Arithmetic and places: kv_cache.h.
//
// A head of queries, keys or values belongs to a group of neighbouring lanes, as many as its halves
// have loads of 16 bytes (8 for half precision and 128 channels). The lanes add up the squares, meet
// by shuffles in a fixed order, and read the head a second time, from the cache, to write it. Which
// lane takes which channels depends on the sizes of a head and the type alone, so a head has the
// same bits wherever it stands. Reads and writes each element once; offsets are int64.
#include "common.cuh"
#include "float_types.cuh"
#include "kernels.h"
#include "kv_cache.h"

namespace fastrl {
namespace {

constexpr int THREADS = 256;
constexpr int COPIES = 8;  // words per thread of a block that copies pages

template <typename T>
__device__ __forceinline__ float rounded(float value) {
    T result;
    narrow(value, result);
    return widen(result);
}

// N neighbouring channels from `start` on, normalised where there is a weight.
template <int N, typename T>
__device__ __forceinline__ void load_channels(const T* head, const T* weight, float rstd,
                                              int start, float (&x)[N]) {
    T items[N], weights[N], nothing;
    narrow(0.0f, nothing);
    load_pack(head + start, N, nothing, items);
    if (weight != nullptr) load_pack(weight + start, N, nothing, weights);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = widen(items[i]);
        if (weight != nullptr) x[i] = rounded<T>(rounded<T>(x[i] * rstd) * widen(weights[i]));
    }
}

template <int N, typename T>
__device__ __forceinline__ void store_channels(T* head, int start, const float (&x)[N]) {
    T items[N];
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(x[i], items[i]);
    store_pack(head + start, N, items);
}

// Pairs (i, i + half), i < half, turned; every lane takes N at a time.
template <int N, typename T>
__device__ __forceinline__ void write_pairs(const T* head, const T* weight, float rstd,
                                            const T* cos, const T* sin, int half, int lane,
                                            int group, T* target) {
    for (int start = lane * N; start < half; start += group * N) {
        float first[N], second[N], c[N], s[N];
        load_channels(head, weight, rstd, start, first);
        load_channels(head, weight, rstd, half + start, second);
        load_channels<N, T>(cos, nullptr, 0.0f, start, c);
        load_channels<N, T>(sin, nullptr, 0.0f, start, s);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const Pair turned = turn_pair({first[i], second[i]}, c[i], s[i]);
            first[i] = turned.first;
            second[i] = turned.second;
        }
        store_channels(target, start, first);
        store_channels(target, half + start, second);
    }
}

template <int N, typename T>
__global__ void __launch_bounds__(THREADS) write_kv_kernel(const WriteKVArguments a, int group) {
    const int per_token = a.query.num_heads + a.key.num_heads + a.value.num_heads;
    const int64_t index = int64_t{blockIdx.x} * (THREADS / group) + threadIdx.x / group;
    const int lane = static_cast<int>(threadIdx.x) % group;
    const bool exists = index < a.num_tokens * per_token;
    const int64_t token = exists ? index / per_token : 0;
    int number = exists ? static_cast<int>(index % per_token) : 0;
    const bool is_query = number < a.query.num_heads;
    if (!is_query) number -= a.query.num_heads;
    const bool is_value = !is_query && number >= a.key.num_heads;
    if (is_value) number -= a.key.num_heads;
    const Heads& heads = is_query ? a.query : is_value ? a.value : a.key;
    const T* head = static_cast<const T*>(heads.data) + token * heads.token_stride +
                    number * heads.head_stride;

    float rstd = 1.0f;
    if (a.q_weight != nullptr) {  // the same for all lanes of a warp, which meet in the shuffles
        float squares = 0.0f;
        if (exists && !is_value) {
            for (int start = lane * N; start < a.num_channels; start += group * N) {
                float x[N];
                load_channels<N, T>(head, nullptr, 0.0f, start, x);
#pragma unroll
                for (int i = 0; i < N; ++i) squares = fmaf(x[i], x[i], squares);
            }
        }
        for (int distance = group / 2; distance > 0; distance /= 2)
            squares += __shfl_xor_sync(ALL_LANES, squares, distance);
        rstd = inverse_rms(squares, a.num_channels, a.epsilon);
    }
    const int64_t slot = a.slots[token];
    if (!exists || (!is_query && (slot < 0 || slot >= a.num_slots))) return;
    T* target = static_cast<T*>(a.query_out) +
                (token * a.query.num_heads + number) * a.num_channels;
    if (!is_query) {
        const int64_t row = kv_row(slot, a.layer, is_value, a.num_layers, a.page_size);
        target = static_cast<T*>(a.kv_pages) + (row * a.key.num_heads + number) * a.num_channels;
    }
    const T* weight = is_value ? nullptr : static_cast<const T*>(is_query ? a.q_weight
                                                                         : a.k_weight);
    const int half = is_value ? 0 : a.half;
    write_pairs<N>(head, weight, rstd, static_cast<const T*>(a.cos) + token * a.cos_stride,
                   static_cast<const T*>(a.sin) + token * a.sin_stride, half, lane, group, target);
    for (int start = 2 * half + lane * N; start < a.num_channels; start += group * N) {
        float x[N];
        load_channels(head, weight, rstd, start, x);
        store_channels(target, start, x);
    }
}

template <typename Word>
__global__ void __launch_bounds__(THREADS)
    copy_pages_kernel(Word* kv_pages, int64_t num_pages, int64_t page_words,
                      const int64_t* sources, const int64_t* targets) {
    const int64_t from = sources[blockIdx.x], to = targets[blockIdx.x];
    if (from < 0 || from >= num_pages || to < 0 || to >= num_pages) return;
    const Word* source = kv_pages + from * page_words;
    Word* target = kv_pages + to * page_words;
    const int64_t first = int64_t{blockIdx.y} * (THREADS * COPIES) + threadIdx.x;
    Word words[COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; ++i)
        if (first + i * THREADS < page_words) words[i] = source[first + i * THREADS];
#pragma unroll
    for (int i = 0; i < COPIES; ++i)
        if (first + i * THREADS < page_words) target[first + i * THREADS] = words[i];
}

template <typename T>
void launch_write(const WriteKVArguments& a, cudaStream_t stream) {
    const bool is_wide = a.half % PACK<T> == 0 && a.num_channels % PACK<T> == 0;
    const int items = is_wide ? PACK<T> : 1;
    const int loads = ((a.half > 0 ? a.half : a.num_channels) + items - 1) / items;
    int group = 1;
    while (group < WARP && group < loads) group *= 2;
    const int64_t num_heads = a.query.num_heads + a.key.num_heads + a.value.num_heads;
    const int64_t per_block = THREADS / group;
    const auto num_blocks = (a.num_tokens * num_heads + per_block - 1) / per_block;
    const auto kernel = is_wide ? write_kv_kernel<PACK<T>, T> : write_kv_kernel<1, T>;
    kernel<<<static_cast<unsigned>(num_blocks), THREADS, 0, stream>>>(a, group);
}

template <typename Word>
void launch_copy(void* kv_pages, int64_t num_pages, int64_t page_bytes, const int64_t* sources,
                 const int64_t* targets, int64_t count, cudaStream_t stream) {
    const int64_t page_words = page_bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t per_block = THREADS * COPIES;
    const dim3 grid(static_cast<unsigned>(count),
                    static_cast<unsigned>((page_words + per_block - 1) / per_block));
    copy_pages_kernel<<<grid, THREADS, 0, stream>>>(static_cast<Word*>(kv_pages), num_pages,
                                                    page_words, sources, targets);
}

}  // namespace

const char* write_kv(const WriteKVArguments& arguments, Launch launch) {
    if (arguments.num_tokens == 0) return nullptr;
    cudaSetDevice(launch.device);
    const auto run = arguments.type == FloatType::float32   ? launch_write<float>
                     : arguments.type == FloatType::float16 ? launch_write<__half>
                                                            : launch_write<__nv_bfloat16>;
    run(arguments, static_cast<cudaStream_t>(launch.stream));
    return launch_error();
}

const char* copy_pages(void* kv_pages, int64_t num_pages, int64_t page_bytes,
                       const int64_t* sources, const int64_t* targets, int64_t count,
                       Launch launch) {
    if (count == 0 || page_bytes == 0) return nullptr;
    cudaSetDevice(launch.device);
    const bool is_wide = page_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(kv_pages) % 16 == 0;
    const auto run = is_wide ? launch_copy<uint4> : launch_copy<uint16_t>;
    run(kv_pages, num_pages, page_bytes, sources, targets, count,
        static_cast<cudaStream_t>(launch.stream));
    return launch_error();
}

}  // namespace fastrl
