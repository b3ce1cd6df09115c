// sample_tokens: token, log-prob, entropy and stop flag of a row in one launch. Formulas: sampling.h.
//
// One block of 256 threads per row, 16 columns a thread and step as in logprob.cu. The first read
// gives the largest score, its lowest id, and the sums of the softmax; the second the mass of every
// tile of 4096 columns; the tile that the random number falls into is read once more. top-k and
// top-p each take four reads more, for a radix selection with a histogram in shared memory (top-p
// one for its total), and then the sums are made again from what is kept. All reads but the first
// find the row in the L2 cache where the rows in flight fit it. Bytes from memory at best: 2V (half
// precision) or 4V per row. Histogram and tiles use integer atomics, whose order is no matter.
#include "common.cuh"
#include "float_types.cuh"
#include "kernels.h"
#include "logprob.h"
#include "sampling.h"

namespace fastrl {
namespace {

constexpr int ITEMS = 16;
constexpr int NUM_WARPS = 8;
constexpr int THREADS = NUM_WARPS * WARP;
constexpr int TILE = THREADS * ITEMS;
constexpr int MAX_TILES = 256;
constexpr int BINS_PER_LANE = RADIX / WARP;

struct Best {
    float score;
    int column;
};

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
    const bool takes_b = b.score > a.score || (b.score == a.score && b.column < a.column);
    return takes_b ? b : a;
}

// What a block shares while it works on its row.
struct Scratch {
    RowSums sums[NUM_WARPS];
    Best best[NUM_WARPS];
    uint64_t masses[MAX_TILES];  // of tiles, or a histogram
    uint64_t of_column[TILE];
    uint64_t of_warp[NUM_WARPS];
    RowSums row_sums;
    Best row_best;
    Selection found;
    uint64_t target;
    int place;
};

// The adjusted scores of one row.
template <int N, typename T>
struct Row {
    const T* logits;
    int num_columns;
    RowSettings settings;
    const bool* seen;
    const int64_t* stops;
    int64_t num_stops;

    __device__ __forceinline__ bool is_stop(int column) const {
        for (int64_t i = 0; i < num_stops; ++i)
            if (stops[i] == column) return true;
        return false;
    }

    __device__ float score(float logit, int column) const {
        return adjusted_score(logit, seen != nullptr && seen[column],
                              settings.suppresses && is_stop(column), settings);
    }

    // body(column, score) for every column of this thread, in rising order; `score` adjusts.
    template <bool ADJUSTS, typename F>
    __device__ __forceinline__ void each(int first, int last, F&& body) const {
        const int own = static_cast<int>(threadIdx.x) * N;
#pragma unroll 1
        for (int column = first + own; column < min(last, num_columns); column += THREADS * N) {
            T loaded[N], nothing;
            narrow(-INFINITY, nothing);
            load_pack(logits + column, num_columns - column, nothing, loaded);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (column + i >= num_columns) break;
                const float logit = widen(loaded[i]);
                body(column + i, ADJUSTS ? score(logit, column + i) : logit / settings.temperature);
            }
        }
    }
};

__device__ uint64_t warp_sum(uint64_t value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value += __shfl_down_sync(ALL_LANES, value, distance);
    return value;
}

// Softmax sums and largest score of what is at least `floor`, in every thread.
template <bool ADJUSTS, typename R>
__device__ RowSums row_sums(const R& row, float floor, Scratch& scratch) {
    RowSums sums = row_nothing();
    Best best{-INFINITY, row.num_columns};
    row.template each<ADJUSTS>(0, row.num_columns, [&](int column, float z) {
        if (z < floor) return;
        const float one[1] = {z};
        row_add(sums, one);
        best = better(best, {z, column});
    });
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        sums = row_merge(sums, {__shfl_down_sync(ALL_LANES, sums.maximum, distance),
                                __shfl_down_sync(ALL_LANES, sums.sum, distance),
                                __shfl_down_sync(ALL_LANES, sums.weighted, distance)});
        best = better(best, {__shfl_down_sync(ALL_LANES, best.score, distance),
                             __shfl_down_sync(ALL_LANES, best.column, distance)});
    }
    if (threadIdx.x % WARP == 0) {
        scratch.sums[threadIdx.x / WARP] = sums;
        scratch.best[threadIdx.x / WARP] = best;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < NUM_WARPS; ++warp) {
            sums = row_merge(sums, scratch.sums[warp]);
            best = better(best, scratch.best[warp]);
        }
        scratch.row_sums = sums;
        scratch.row_best = best;
    }
    __syncthreads();
    return scratch.row_sums;
}

// What a token amounts to: 1, or its mass.
__device__ __forceinline__ uint64_t amount_of(float z, float maximum, bool by_mass) {
    return by_mass ? token_mass(z - maximum) : 1;
}

// The mass of all that is at least `floor`, in every thread.
template <typename R>
__device__ uint64_t total_mass(const R& row, float maximum, float floor, Scratch& scratch) {
    uint64_t mass = 0;
    row.template each<true>(0, row.num_columns, [&](int, float z) {
        if (z >= floor) mass += token_mass(z - maximum);
    });
    mass = warp_sum(mass);
    if (threadIdx.x % WARP == 0) scratch.of_warp[threadIdx.x / WARP] = mass;
    __syncthreads();
    uint64_t total = 0;
    for (int warp = 0; warp < NUM_WARPS; ++warp) total += scratch.of_warp[warp];
    __syncthreads();
    return total;
}

// The first warp finds the next digit in the histogram.
__device__ void find_digit(int digit, Scratch& scratch) {
    const int lane = static_cast<int>(threadIdx.x), first = lane * BINS_PER_LANE;
    uint64_t own = 0;
    for (int i = 0; i < BINS_PER_LANE; ++i) own += scratch.masses[first + i];
    uint64_t from_here = own;  // of this lane and those above it
    for (int distance = 1; distance < WARP; distance *= 2) {
        const uint64_t other = __shfl_down_sync(ALL_LANES, from_here, distance);
        if (lane + distance < WARP) from_here += other;
    }
    uint64_t above = from_here - own;
    const Selection found = scratch.found;
    __syncwarp();
    if (above >= found.wanted) return;
    const int bin = crossing_bin<BINS_PER_LANE>(scratch.masses, first, found.wanted, above);
    if (bin >= 0) scratch.found = with_digit(found, digit, bin, above);
}

// The largest score t such that what is at least t, and at least `floor`, amounts to `wanted`.
template <typename R>
__device__ float least_kept(const R& row, float maximum, float floor, uint64_t wanted,
                            bool by_mass, Scratch& scratch) {
    if (threadIdx.x == 0) scratch.found = {0, wanted};
    for (int digit = 0; digit < NUM_DIGITS; ++digit) {
        scratch.masses[threadIdx.x] = 0;
        __syncthreads();
        const Selection found = scratch.found;
        row.template each<true>(0, row.num_columns, [&](int, float z) {
            const uint32_t order = order_of(z);
            if (!(z >= floor) || !has_prefix(order, found, digit)) return;
            const uint64_t amount = amount_of(z, maximum, by_mass);
            if (amount > 0)
                atomicAdd(reinterpret_cast<unsigned long long*>(
                              &scratch.masses[digit_of(order, digit)]),
                          static_cast<unsigned long long>(amount));
        });
        __syncthreads();
        if (threadIdx.x < WARP) find_digit(digit, scratch);
        __syncthreads();
    }
    return score_of(scratch.found.prefix);
}

// The token that the random number falls on; the last column where nothing has any mass.
template <typename R>
__device__ int draw(const R& row, float maximum, float floor, uint32_t word, Scratch& scratch) {
    const int num_tiles = (row.num_columns + TILE - 1) / TILE;
    scratch.masses[threadIdx.x] = 0;
    __syncthreads();
    for (int tile = 0; tile < row.num_columns; tile += TILE) {
        uint64_t mass = 0;
        row.template each<true>(tile, tile + TILE, [&](int, float z) {
            if (!(z < floor)) mass += token_mass(z - maximum);
        });
        mass = warp_sum(mass);
        if (threadIdx.x % WARP == 0)
            atomicAdd(reinterpret_cast<unsigned long long*>(&scratch.masses[tile / TILE]),
                      static_cast<unsigned long long>(mass));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint64_t total = 0;
        for (int i = 0; i < num_tiles; ++i) total += scratch.masses[i];
        uint64_t target = draw_target(word, total);
        scratch.place = first_past(scratch.masses, num_tiles, target);
        scratch.target = target;
    }
    __syncthreads();
    if (scratch.place == num_tiles) return row.num_columns - 1;
    const int tile = scratch.place * TILE;
    uint64_t target = scratch.target;
    for (int i = threadIdx.x; i < TILE; i += THREADS) scratch.of_column[i] = 0;
    __syncthreads();
    row.template each<true>(tile, tile + TILE, [&](int column, float z) {
        scratch.of_column[column - tile] = z < floor ? 0 : token_mass(z - maximum);
    });
    __syncthreads();
    // Each thread takes 16 neighbours; the one in whose sum the target lies finds the token.
    const uint64_t* own = scratch.of_column + threadIdx.x * ITEMS;
    uint64_t sum = 0;
    for (int i = 0; i < ITEMS; ++i) sum += own[i];
    uint64_t up_to_here = sum;  // of the warp's threads
    for (int distance = 1; distance < WARP; distance *= 2) {
        const uint64_t other = __shfl_up_sync(ALL_LANES, up_to_here, distance);
        if (static_cast<int>(threadIdx.x % WARP) >= distance) up_to_here += other;
    }
    if (threadIdx.x % WARP == WARP - 1) scratch.of_warp[threadIdx.x / WARP] = up_to_here;
    __syncthreads();
    for (int warp = 0; warp < static_cast<int>(threadIdx.x) / WARP; ++warp)
        up_to_here += scratch.of_warp[warp];
    const uint64_t before = up_to_here - sum;
    if (before <= target && target < up_to_here) {
        target -= before;
        scratch.place = tile + static_cast<int>(threadIdx.x) * ITEMS +
                        first_past(own, ITEMS, target);
    }
    __syncthreads();
    return scratch.place;
}

template <int N, typename T>
__global__ void __launch_bounds__(THREADS, 2) sample_tokens_kernel(const SampleArguments a) {
    __shared__ Scratch scratch;
    const int64_t b = blockIdx.x;
    const int num_columns = a.logits.num_columns;
    const RowSettings settings{a.temperature[b], a.penalty == nullptr ? 1.0f : a.penalty[b],
                               a.suppresses != nullptr && a.suppresses[b]};
    const Row<N, T> row{static_cast<const T*>(a.logits.data) + b * a.logits.stride, num_columns,
                        settings, a.seen == nullptr ? nullptr : a.seen + b * num_columns,
                        a.stops == nullptr ? nullptr : a.stops + b * a.num_stops, a.num_stops};
    RowSums sums = row_sums<true>(row, -INFINITY, scratch);
    const float maximum = sums.maximum;
    const int best = scratch.row_best.column;
    float floor = -INFINITY;
    if (a.top_k[b] > 0 && a.top_k[b] < num_columns)
        floor = least_kept(row, maximum, floor, static_cast<uint64_t>(a.top_k[b]), false, scratch);
    if (a.top_p[b] < 1.0f) {
        const uint64_t total = total_mass(row, maximum, floor, scratch);
        if (total > 0)
            floor = fmaxf(floor, least_kept(row, maximum, floor, wanted_mass(a.top_p[b], total),
                                            true, scratch));
    }
    if (a.min_p[b] > 0.0f) floor = fmaxf(floor, maximum + logf(a.min_p[b]));
    if (floor > -INFINITY) sums = row_sums<true>(row, floor, scratch);
    const int drawn = draw(row, maximum, floor, random_word(a.seeds[b], a.positions[b]), scratch);
    const int token = a.greedy[b] && best < num_columns ? best : drawn;
    RowStats stats = row_stats(sums);
    const float entropy = stats.entropy;
    float z = row.score(widen(row.logits[token]), token);
    if (a.raw_logprobs[b]) {
        stats = row_stats(row_sums<false>(row, -INFINITY, scratch));
        z = widen(row.logits[token]) / settings.temperature;
    }
    if (threadIdx.x != 0) return;
    a.token_ids[b] = token;
    a.logprobs[b] = row_logprob(stats, z);
    a.entropy[b] = entropy;
    a.stopped[b] = row.is_stop(token);
}

template <typename T>
void run(const SampleArguments& a, cudaStream_t stream) {
    const auto kernel = a.logits.num_columns % PACK<T> == 0 ? sample_tokens_kernel<PACK<T>, T>
                                                            : sample_tokens_kernel<1, T>;
    kernel<<<static_cast<unsigned>(a.logits.num_rows), THREADS, 0, stream>>>(a);
}

}  // namespace

const char* sample_tokens(const SampleArguments& arguments, Launch launch) {
    if (arguments.logits.num_rows == 0) return nullptr;
    cudaSetDevice(launch.device);
    const auto stream = static_cast<cudaStream_t>(launch.stream);
    const FloatType type = arguments.logits.type;
    if (type == FloatType::float32) run<float>(arguments, stream);
    if (type == FloatType::float16) run<__half>(arguments, stream);
    if (type == FloatType::bfloat16) run<__nv_bfloat16>(arguments, stream);
    return launch_error();
}

}  // namespace fastrl
