// The launchers: plain pointers and sizes. Each returns null, or why its launch failed.
#pragma once

#include <cstdint>

namespace fastrl {

// Where to run. `stream` is a cudaStream_t of that device.
struct Launch {
    int device;
    void* stream;
};

enum class FloatType { float32, float16, bfloat16 };

// Logits [num_rows, num_columns]; neighbours in a row are neighbours in memory.
struct LogitRows {
    const void* data;
    FloatType type;
    int64_t num_rows;
    int num_columns;
    int64_t stride;
};

// Elements of one tensor that a block of a launch over many tensors works on.
constexpr int TENSOR_CHUNK = 16384;

// table [K, 9]: addresses of weight, gradient, m, v, remainder, scales of m and v (0 where there is
// none), whether the weight decays, number of elements. chunks [num_chunks, 2]: tensor, number of
// the chunk in it. step_factors [3]: step_size, epsilon, scale of the gradients.
const char* adamw(const int64_t* table, const int* chunks, int64_t num_chunks,
                  const float* step_factors, float beta1, float add_first, float beta2,
                  float add_second, float decay, bool is_bf16, bool is_8bit, Launch launch);

// table [K, 2]: address and number of elements of each gradient; chunks as above.
// sums [num_chunks].
const char* grad_norm_parts(const int64_t* table, const int* chunks, int64_t num_chunks,
                            FloatType type, double* sums, Launch launch);

// norm = sqrt(sum of sums [count]).
const char* grad_norm_merge(const double* sums, int64_t count, double* norm, Launch launch);

// One entry per row, except seen [num_rows, num_columns] and stops [num_rows, num_stops].
// penalty, seen, stops and suppresses may be null.
struct SampleArguments {
    LogitRows logits;
    const int64_t* seeds;
    const int64_t* positions;
    const float* temperature;
    const int64_t* top_k;
    const float* top_p;
    const float* min_p;
    const bool* greedy;
    const bool* raw_logprobs;
    const float* penalty;
    const bool* seen;
    const int64_t* stops;
    const bool* suppresses;
    int64_t num_stops;
    int64_t* token_ids;
    float* logprobs;
    float* entropy;
    bool* stopped;
};

// Padded: cu_seqlens null, rows of row_length. Packed: cu_seqlens [num_rows + 1].
// mask and moments may be null; moments [num_rows, 3] gets count, sum, and sum of squares about the
// row's own mean, of the advantages.
const char* gae(const float* rewards, const float* values, const bool* mask,
                const int64_t* cu_seqlens, int64_t num_rows, int64_t row_length, float gamma,
                float decay, float* advantages, float* returns, float* moments, Launch launch);

// mask may be null.
const char* kl_estimate(const float* logprobs, const float* ref_logprobs, const bool* mask,
                        int64_t numel, float* k1, float* k2, float* k3, Launch launch);

const char* kl_gradient(const float* logprobs, const float* ref_logprobs, const bool* mask,
                        const float* dk1, const float* dk2, const float* dk3, int64_t numel,
                        float* dlogprobs, Launch launch);

// estimator 1, 2 or 3 is the penalty; k1, k2 and k3 are each written where not null.
const char* shape_rewards(const float* scores, const float* logprobs, const float* ref_logprobs,
                          const bool* mask, int64_t num_rows, int64_t row_length, float kl_coef,
                          int estimator, float* rewards, float* k1, float* k2, float* k3,
                          Launch launch);

// maximum and log_sum are those of logits / temperature, for the gradient.
const char* gather_logprobs(const LogitRows& logits, const int64_t* token_ids,
                            float inverse_temperature, float* logprobs, float* entropy,
                            float* maximum, float* log_sum, Launch launch);

// dentropy may be null; gradient has the type of the logits and may be their memory.
const char* gather_logprobs_gradient(const LogitRows& logits, const int64_t* token_ids,
                                     const float* entropy, const float* maximum,
                                     const float* log_sum, const float* dlogprobs,
                                     const float* dentropy, float inverse_temperature,
                                     void* gradient, int64_t gradient_stride, Launch launch);

const char* sample_tokens(const SampleArguments& arguments, Launch launch);

// [num_tokens, num_heads, num_channels]; the channels of a head are neighbours in memory.
struct Heads {
    const void* data;
    int num_heads;
    int64_t token_stride;
    int64_t head_stride;
};

// Null where there is none: both weights, [num_channels]; both of cos and sin, [num_tokens, half],
// with half 0. Without queries query.num_heads is 0. kv_pages [num_pages, num_layers, 2, page_size,
// key.num_heads, num_channels], query_out contiguous; all of one type.
struct WriteKVArguments {
    Heads query;
    Heads key;
    Heads value;
    const void* q_weight;
    const void* k_weight;
    const void* cos;
    const void* sin;
    int64_t cos_stride;
    int64_t sin_stride;
    const int64_t* slots;
    void* query_out;
    void* kv_pages;
    FloatType type;
    int64_t num_tokens;
    int64_t layer;
    int64_t num_slots;
    int64_t num_layers;
    int64_t page_size;
    int num_channels;
    int half;
    float epsilon;
};

const char* write_kv(const WriteKVArguments& arguments, Launch launch);

// sources and targets [count]: pages of page_bytes, no target twice and none a source; pages that
// are not among the num_pages are left out, as are slots of write_kv.
const char* copy_pages(void* kv_pages, int64_t num_pages, int64_t page_bytes, const int64_t* sources,
                       const int64_t* targets, int64_t count, Launch launch);

}  // namespace fastrl
