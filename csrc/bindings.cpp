// Schemas and registration of the ops in torch.ops.fastrl_cuda. Every op writes into tensors that
// the caller allocated, on the stream that the caller passes (a cudaStream_t as an integer).
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arena.h"
#include "checks.h"
#include "kernels.h"

namespace fastrl {
namespace {

using torch::stable::accelerator::DeviceGuard;

Launch on_stream(const Tensor& tensor, int64_t stream) {
    return {tensor.get_device_index(), reinterpret_cast<void*>(stream)};
}

void finish(const char* op, const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string(op) + ": CUDA says: " + error);
}

void run_gae(const Tensor rewards, const Tensor values, const std::optional<Tensor> mask,
             const std::optional<Tensor> cu_seqlens, double gamma, double decay,
             const Tensor advantages, const Tensor returns, const std::optional<Tensor> moments,
             int64_t stream) {
    const char* op = "gae";
    const int64_t numel = rewards.numel();
    const bool is_packed = cu_seqlens.has_value();
    require(rewards.dim() == (is_packed ? 1 : 2), op, "rewards", "[B, T], or [N] with cu_seqlens");
    const int64_t num_rows = is_packed ? cu_seqlens->numel() - 1 : rewards.size(0);
    const int64_t row_length = is_packed ? 0 : rewards.size(1);
    require(num_rows >= 0 && num_rows < (int64_t{1} << 31), op, "rows", "from 0 to 2^31 - 1");
    const DeviceGuard guard(rewards.get_device_index());
    const auto number = ScalarType::Float;
    finish(op, gae(
        static_cast<const float*>(data(op, "rewards", rewards, number, numel, rewards)),
        static_cast<const float*>(data(op, "values", values, number, numel, rewards)),
        static_cast<const bool*>(data(op, "mask", mask, ScalarType::Bool, numel, rewards)),
        static_cast<const int64_t*>(
            data(op, "cu_seqlens", cu_seqlens, ScalarType::Long, num_rows + 1, rewards)),
        num_rows, row_length, static_cast<float>(gamma), static_cast<float>(decay),
        static_cast<float*>(data(op, "advantages", advantages, number, numel, rewards)),
        static_cast<float*>(data(op, "returns", returns, number, numel, rewards)),
        static_cast<float*>(data(op, "moments", moments, number, 3 * num_rows, rewards)),
        on_stream(rewards, stream)));
}

float* floats(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
    return static_cast<float*>(data(op, name, tensor, ScalarType::Float, like.numel(), like));
}

float* floats(const char* op, const char* name, const std::optional<Tensor>& tensor,
              const Tensor& like) {
    return tensor.has_value() ? floats(op, name, *tensor, like) : nullptr;
}

const bool* keep(const char* op, const std::optional<Tensor>& mask, const Tensor& like) {
    return static_cast<const bool*>(data(op, "mask", mask, ScalarType::Bool, like.numel(), like));
}

void run_kl_estimate(const Tensor logprobs, const Tensor ref_logprobs,
                     const std::optional<Tensor> mask, const Tensor k1, const Tensor k2,
                     const Tensor k3, int64_t stream) {
    const char* op = "kl_estimate";
    const DeviceGuard guard(logprobs.get_device_index());
    finish(op, kl_estimate(floats(op, "logprobs", logprobs, logprobs),
                           floats(op, "ref_logprobs", ref_logprobs, logprobs),
                           keep(op, mask, logprobs), logprobs.numel(),
                           floats(op, "k1", k1, logprobs), floats(op, "k2", k2, logprobs),
                           floats(op, "k3", k3, logprobs), on_stream(logprobs, stream)));
}

void run_kl_gradient(const Tensor logprobs, const Tensor ref_logprobs,
                     const std::optional<Tensor> mask, const Tensor dk1, const Tensor dk2,
                     const Tensor dk3, const Tensor dlogprobs, int64_t stream) {
    const char* op = "kl_gradient";
    const DeviceGuard guard(logprobs.get_device_index());
    finish(op, kl_gradient(floats(op, "logprobs", logprobs, logprobs),
                           floats(op, "ref_logprobs", ref_logprobs, logprobs),
                           keep(op, mask, logprobs), floats(op, "dk1", dk1, logprobs),
                           floats(op, "dk2", dk2, logprobs), floats(op, "dk3", dk3, logprobs),
                           logprobs.numel(), floats(op, "dlogprobs", dlogprobs, logprobs),
                           on_stream(logprobs, stream)));
}

void run_shape_rewards(const Tensor scores, const Tensor logprobs, const Tensor ref_logprobs,
                       const Tensor mask, double kl_coef, int64_t estimator, const Tensor rewards,
                       const std::optional<Tensor> k1, const std::optional<Tensor> k2,
                       const std::optional<Tensor> k3, int64_t stream) {
    const char* op = "shape_rewards";
    require(logprobs.dim() == 2, op, "logprobs", "[B, T]");
    require(estimator >= 1 && estimator <= 3, op, "estimator", "1, 2 or 3");
    const int64_t num_rows = logprobs.size(0), row_length = logprobs.size(1);
    const int64_t limit = int64_t{1} << 31;
    require(num_rows < limit && row_length < limit, op, "B and T", "below 2^31");
    const DeviceGuard guard(logprobs.get_device_index());
    finish(op, shape_rewards(
        static_cast<const float*>(
            data(op, "scores", scores, ScalarType::Float, num_rows, logprobs)),
        floats(op, "logprobs", logprobs, logprobs),
        floats(op, "ref_logprobs", ref_logprobs, logprobs), keep(op, mask, logprobs), num_rows,
        row_length, static_cast<float>(kl_coef), static_cast<int>(estimator),
        floats(op, "rewards", rewards, logprobs), floats(op, "k1", k1, logprobs),
        floats(op, "k2", k2, logprobs), floats(op, "k3", k3, logprobs),
        on_stream(logprobs, stream)));
}

FloatType float_type(const char* op, const char* name, const Tensor& tensor) {
    const ScalarType dtype = tensor.scalar_type();
    require(dtype == ScalarType::Float || dtype == ScalarType::Half ||
                dtype == ScalarType::BFloat16, op, name, "float32, float16 or bfloat16");
    return dtype == ScalarType::Float  ? FloatType::float32
           : dtype == ScalarType::Half ? FloatType::float16
                                       : FloatType::bfloat16;
}

LogitRows rows_of(const char* op, const Tensor& logits) {
    require(logits.dim() == 2, op, "logits", "[M, V]");
    const FloatType type = float_type(op, "logits", logits);
    require(logits.size(0) < (int64_t{1} << 31), op, "M", "below 2^31");
    require(logits.size(1) > 0 && logits.size(1) < (int64_t{1} << 30), op, "V", "from 1 to 2^30");
    return {logit_rows(op, "logits", logits, logits), type, logits.size(0),
            static_cast<int>(logits.size(1)), logits.stride(0)};
}

// One float32 per row of the logits.
float* per_row(const char* op, const char* name, const Tensor& tensor, const Tensor& logits) {
    return static_cast<float*>(
        data(op, name, tensor, ScalarType::Float, logits.size(0), logits));
}

const int64_t* tokens(const char* op, const Tensor& token_ids, const Tensor& logits) {
    return static_cast<const int64_t*>(
        data(op, "token_ids", token_ids, ScalarType::Long, logits.size(0), logits));
}

void run_gather_logprobs(const Tensor logits, const Tensor token_ids, double temperature,
                         const Tensor logprobs, const Tensor entropy, const Tensor maximum,
                         const Tensor log_sum, int64_t stream) {
    const char* op = "gather_logprobs";
    const LogitRows rows = rows_of(op, logits);
    const DeviceGuard guard(logits.get_device_index());
    finish(op, gather_logprobs(rows, tokens(op, token_ids, logits),
                               static_cast<float>(1.0 / temperature),
                               per_row(op, "logprobs", logprobs, logits),
                               per_row(op, "entropy", entropy, logits),
                               per_row(op, "maximum", maximum, logits),
                               per_row(op, "log_sum", log_sum, logits),
                               on_stream(logits, stream)));
}

void run_gather_logprobs_gradient(const Tensor logits, const Tensor token_ids,
                                  const Tensor entropy, const Tensor maximum,
                                  const Tensor log_sum, const Tensor dlogprobs,
                                  const std::optional<Tensor> dentropy, double temperature,
                                  const Tensor gradient, int64_t stream) {
    const char* op = "gather_logprobs_gradient";
    const LogitRows rows = rows_of(op, logits);
    const DeviceGuard guard(logits.get_device_index());
    finish(op, gather_logprobs_gradient(
        rows, tokens(op, token_ids, logits), per_row(op, "entropy", entropy, logits),
        per_row(op, "maximum", maximum, logits), per_row(op, "log_sum", log_sum, logits),
        per_row(op, "dlogprobs", dlogprobs, logits),
        dentropy.has_value() ? per_row(op, "dentropy", *dentropy, logits) : nullptr,
        static_cast<float>(1.0 / temperature), logit_rows(op, "gradient", gradient, logits),
        gradient.stride(0), on_stream(logits, stream)));
}

// The tensors of a launch over many are known by the addresses in `table`, which the caller keeps.
void run_adamw(const Tensor table, const Tensor chunks, const Tensor step_factors, double beta1,
               double beta2, double decay, bool is_bf16, bool is_8bit, int64_t stream) {
    const char* op = "adamw";
    require(table.dim() == 2 && table.size(1) == 9, op, "table", "[K, 9]");
    require(chunks.dim() == 2 && chunks.size(1) == 2, op, "chunks", "[n, 2]");
    const int64_t num_chunks = chunks.size(0);
    require(num_chunks < (int64_t{1} << 31), op, "chunks", "below 2^31");
    const DeviceGuard guard(table.get_device_index());
    finish(op, adamw(
        static_cast<const int64_t*>(
            data(op, "table", table, ScalarType::Long, table.numel(), table)),
        static_cast<const int*>(
            data(op, "chunks", chunks, ScalarType::Int, 2 * num_chunks, table)),
        num_chunks,
        static_cast<const float*>(
            data(op, "step_factors", step_factors, ScalarType::Float, 3, table)),
        static_cast<float>(beta1), static_cast<float>(1 - beta1), static_cast<float>(beta2),
        static_cast<float>(1 - beta2), static_cast<float>(decay), is_bf16, is_8bit,
        on_stream(table, stream)));
}

void run_grad_norm_parts(const Tensor table, const Tensor chunks, int64_t type, const Tensor sums,
                         int64_t stream) {
    const char* op = "grad_norm_parts";
    require(table.dim() == 2 && table.size(1) == 2, op, "table", "[K, 2]");
    require(chunks.dim() == 2 && chunks.size(1) == 2, op, "chunks", "[n, 2]");
    require(type >= 0 && type <= 2, op, "type", "0 (float32), 1 (float16) or 2 (bfloat16)");
    const int64_t num_chunks = chunks.size(0);
    require(num_chunks < (int64_t{1} << 31), op, "chunks", "below 2^31");
    const DeviceGuard guard(table.get_device_index());
    finish(op, grad_norm_parts(
        static_cast<const int64_t*>(
            data(op, "table", table, ScalarType::Long, table.numel(), table)),
        static_cast<const int*>(
            data(op, "chunks", chunks, ScalarType::Int, 2 * num_chunks, table)),
        num_chunks, static_cast<FloatType>(type),
        static_cast<double*>(data(op, "sums", sums, ScalarType::Double, num_chunks, table)),
        on_stream(table, stream)));
}

void run_grad_norm_merge(const Tensor sums, const Tensor norm, int64_t stream) {
    const char* op = "grad_norm_merge";
    const DeviceGuard guard(sums.get_device_index());
    finish(op, grad_norm_merge(
        static_cast<const double*>(
            data(op, "sums", sums, ScalarType::Double, sums.numel(), sums)),
        sums.numel(),
        static_cast<double*>(data(op, "norm", norm, ScalarType::Double, 1, sums)),
        on_stream(sums, stream)));
}

// A tensor with one entry per row of the logits, or null.
template <typename T>
T* row_column(const char* op, const char* name, const std::optional<Tensor>& tensor,
              ScalarType dtype, int64_t width, const Tensor& logits) {
    return static_cast<T*>(data(op, name, tensor, dtype, logits.size(0) * width, logits));
}

void run_sample_tokens(const Tensor logits, const Tensor seeds, const Tensor positions,
                       const Tensor temperature, const Tensor top_k, const Tensor top_p,
                       const Tensor min_p, const Tensor greedy, const Tensor raw_logprobs,
                       const std::optional<Tensor> penalty, const std::optional<Tensor> seen,
                       const std::optional<Tensor> stops, const std::optional<Tensor> suppresses,
                       const Tensor token_ids, const Tensor logprobs, const Tensor entropy,
                       const Tensor stopped, int64_t stream) {
    const char* op = "sample_tokens";
    const LogitRows rows = rows_of(op, logits);
    require(rows.num_columns <= 1 << 20, op, "V", "of at most 2^20");
    const DeviceGuard guard(logits.get_device_index());
    const auto number = ScalarType::Float, integer = ScalarType::Long, flag = ScalarType::Bool;
    const int64_t num_stops = stops.has_value() ? stops->size(1) : 0;
    const SampleArguments arguments{
        rows,
        row_column<int64_t>(op, "seeds", seeds, integer, 1, logits),
        row_column<int64_t>(op, "positions", positions, integer, 1, logits),
        row_column<float>(op, "temperature", temperature, number, 1, logits),
        row_column<int64_t>(op, "top_k", top_k, integer, 1, logits),
        row_column<float>(op, "top_p", top_p, number, 1, logits),
        row_column<float>(op, "min_p", min_p, number, 1, logits),
        row_column<bool>(op, "greedy", greedy, flag, 1, logits),
        row_column<bool>(op, "raw_logprobs", raw_logprobs, flag, 1, logits),
        row_column<float>(op, "repetition_penalty", penalty, number, 1, logits),
        row_column<bool>(op, "seen", seen, flag, rows.num_columns, logits),
        row_column<int64_t>(op, "stop_token_ids", stops, integer, num_stops, logits),
        row_column<bool>(op, "suppresses_stops", suppresses, flag, 1, logits),
        num_stops,
        row_column<int64_t>(op, "token_ids", token_ids, integer, 1, logits),
        row_column<float>(op, "logprobs", logprobs, number, 1, logits),
        row_column<float>(op, "entropy", entropy, number, 1, logits),
        row_column<bool>(op, "stopped", stopped, flag, 1, logits)};
    finish(op, sample_tokens(arguments, on_stream(logits, stream)));
}

// Heads [N, num_heads, C] of the pages' type, or cos and sin as [N, 1, R/2].
Heads heads_of(const char* op, const char* name, const Tensor& tensor, int64_t num_tokens,
               int64_t num_channels, const Tensor& kv_pages) {
    require(tensor.is_cuda() && tensor.get_device_index() == kv_pages.get_device_index(), op, name,
            "on the GPU of the pages; move it with .to(device)");
    require(tensor.scalar_type() == kv_pages.scalar_type(), op, name, "of the dtype of the pages");
    require(tensor.dim() == 3 && tensor.size(0) == num_tokens && tensor.size(2) == num_channels,
            op, name, "[N, heads, channels], as the keys and the pages");
    require(num_channels <= 1 || tensor.stride(2) == 1, op, name,
            "with neighbouring channels side by side; call .contiguous()");
    return {tensor.data_ptr(), static_cast<int>(tensor.size(1)), tensor.stride(0),
            tensor.stride(1)};
}

void run_write_kv(const std::optional<Tensor> query, const Tensor key, const Tensor value,
                  const std::optional<Tensor> q_weight, const std::optional<Tensor> k_weight,
                  const std::optional<Tensor> cos, const std::optional<Tensor> sin,
                  double epsilon, const Tensor kv_pages, int64_t layer, const Tensor slots,
                  const std::optional<Tensor> query_out, int64_t stream) {
    const char* op = "write_kv";
    require(kv_pages.is_cuda() && kv_pages.dim() == 6 && kv_pages.size(2) == 2 &&
                kv_pages.is_contiguous(), op, "kv_pages",
            "[num_pages, L, 2, page_size, Hk, C], contiguous");
    require(query.has_value() == query_out.has_value() && q_weight.has_value() ==
                k_weight.has_value() && cos.has_value() == sin.has_value(), op,
            "query and query_out, q_weight and k_weight, cos and sin", "in pairs");
    require(layer >= 0 && layer < kv_pages.size(1), op, "layer", "below L");
    const int64_t num_tokens = key.size(0), num_channels = kv_pages.size(5);
    const int64_t half = cos.has_value() ? cos->size(2) : 0;
    require(2 * half <= num_channels, op, "cos", "[N, 1, R/2] with R at most C");
    const auto dtype = kv_pages.scalar_type();
    const Heads keys = heads_of(op, "key", key, num_tokens, num_channels, kv_pages);
    const Heads values = heads_of(op, "value", value, num_tokens, num_channels, kv_pages);
    require(keys.num_heads == kv_pages.size(4) && values.num_heads == keys.num_heads, op,
            "key and value", "with the heads of the pages");
    WriteKVArguments arguments{};
    if (query.has_value()) {
        arguments.query = heads_of(op, "query", *query, num_tokens, num_channels, kv_pages);
        arguments.query_out = data(op, "query_out", *query_out, dtype, query->numel(), kv_pages);
    }
    if (cos.has_value()) {
        const Heads cosines = heads_of(op, "cos", *cos, num_tokens, half, kv_pages);
        const Heads sines = heads_of(op, "sin", *sin, num_tokens, half, kv_pages);
        arguments.cos = cosines.data, arguments.cos_stride = cosines.token_stride;
        arguments.sin = sines.data, arguments.sin_stride = sines.token_stride;
    }
    require(num_tokens * (int64_t{arguments.query.num_heads} + 2 * keys.num_heads) <
                (int64_t{1} << 31), op, "heads of all tokens", "below 2^31");
    arguments.key = keys, arguments.value = values;
    arguments.q_weight = data(op, "q_weight", q_weight, dtype, num_channels, kv_pages);
    arguments.k_weight = data(op, "k_weight", k_weight, dtype, num_channels, kv_pages);
    arguments.slots = static_cast<const int64_t*>(
        data(op, "slot_mapping", slots, ScalarType::Long, num_tokens, kv_pages));
    arguments.kv_pages = kv_pages.data_ptr();
    arguments.type = float_type(op, "kv_pages", kv_pages);
    arguments.num_tokens = num_tokens, arguments.layer = layer;
    arguments.num_layers = kv_pages.size(1), arguments.page_size = kv_pages.size(3);
    arguments.num_slots = kv_pages.size(0) * kv_pages.size(3);
    arguments.num_channels = static_cast<int>(num_channels);
    arguments.half = static_cast<int>(half), arguments.epsilon = static_cast<float>(epsilon);
    const DeviceGuard guard(kv_pages.get_device_index());
    finish(op, write_kv(arguments, on_stream(kv_pages, stream)));
}

void run_copy_pages(const Tensor kv_pages, const Tensor sources, const Tensor targets,
                    int64_t stream) {
    const char* op = "copy_pages";
    require(kv_pages.is_cuda() && kv_pages.dim() == 6 && kv_pages.is_contiguous(), op, "kv_pages",
            "[num_pages, L, 2, page_size, Hk, C], contiguous");
    const int64_t count = sources.numel();
    const int64_t item = float_type(op, "kv_pages", kv_pages) == FloatType::float32 ? 4 : 2;
    const DeviceGuard guard(kv_pages.get_device_index());
    finish(op, copy_pages(
        kv_pages.data_ptr(), kv_pages.size(0), kv_pages.size(0) == 0 ? 0 : kv_pages.stride(0) * item,
        static_cast<const int64_t*>(
            data(op, "sources", sources, ScalarType::Long, count, kv_pages)),
        static_cast<const int64_t*>(
            data(op, "targets", targets, ScalarType::Long, count, kv_pages)),
        count, on_stream(kv_pages, stream)));
}

// The bytes of a range as a tensor. It owns nothing: the range has to outlive it.
Tensor arena_bytes(int64_t address, int64_t num_bytes, int64_t device) {
    const int64_t stride = 1;
    return torch::stable::from_blob(
        reinterpret_cast<void*>(static_cast<uintptr_t>(address)), {&num_bytes, 1}, {&stride, 1},
        torch::stable::Device(torch::headeronly::DeviceType::CUDA,
                              static_cast<torch::stable::accelerator::DeviceIndex>(device)),
        ScalarType::Byte);
}

}  // namespace
}  // namespace fastrl

STABLE_TORCH_LIBRARY(fastrl_cuda, m) {
    m.def("gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, float gamma, "
          "float decay, Tensor(a!) advantages, Tensor(b!) returns, Tensor(c!)? moments, "
          "int stream) -> ()");
    m.def("kl_estimate(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor(a!) k1, "
          "Tensor(b!) k2, Tensor(c!) k3, int stream) -> ()");
    m.def("kl_gradient(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor dk1, "
          "Tensor dk2, Tensor dk3, Tensor(a!) dlogprobs, int stream) -> ()");
    m.def("shape_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask, "
          "float kl_coef, int estimator, Tensor(a!) rewards, Tensor(b!)? k1, Tensor(c!)? k2, "
          "Tensor(d!)? k3, int stream) -> ()");
    m.def("gather_logprobs(Tensor logits, Tensor token_ids, float temperature, "
          "Tensor(a!) logprobs, Tensor(b!) entropy, Tensor(c!) maximum, Tensor(d!) log_sum, "
          "int stream) -> ()");
    m.def("gather_logprobs_gradient(Tensor logits, Tensor token_ids, Tensor entropy, "
          "Tensor maximum, Tensor log_sum, Tensor dlogprobs, Tensor? dentropy, "
          "float temperature, Tensor(a!) gradient, int stream) -> ()");
    m.def("adamw(Tensor table, Tensor chunks, Tensor step_factors, float beta1, float beta2, "
          "float decay, bool is_bf16, bool is_8bit, int stream) -> ()");
    m.def("grad_norm_parts(Tensor table, Tensor chunks, int type, Tensor(a!) sums, int stream) "
          "-> ()");
    m.def("grad_norm_merge(Tensor sums, Tensor(a!) norm, int stream) -> ()");
    m.def("sample_tokens(Tensor logits, Tensor seeds, Tensor positions, Tensor temperature, "
          "Tensor top_k, Tensor top_p, Tensor min_p, Tensor greedy, Tensor raw_logprobs, "
          "Tensor? repetition_penalty, Tensor? seen, Tensor? stop_token_ids, "
          "Tensor? suppresses_stops, Tensor(a!) token_ids, Tensor(b!) logprobs, "
          "Tensor(c!) entropy, Tensor(d!) stopped, int stream) -> ()");
    m.def("write_kv(Tensor? query, Tensor key, Tensor value, Tensor? q_weight, Tensor? k_weight, "
          "Tensor? cos, Tensor? sin, float epsilon, Tensor(a!) kv_pages, int layer, "
          "Tensor slot_mapping, Tensor(b!)? query_out, int stream) -> ()");
    m.def("copy_pages(Tensor(a!) kv_pages, Tensor sources, Tensor targets, int stream) -> ()");
    m.def("arena_granularity(int device) -> int");
    m.def("arena_reserve(int num_bytes) -> int");
    m.def("arena_map(int address, int num_bytes, int device) -> ()");
    m.def("arena_unmap(int address, int num_bytes) -> ()");
    m.def("arena_free(int address, int num_bytes) -> ()");
    m.def("arena_bytes(int address, int num_bytes, int device) -> Tensor");
}

// Ops on addresses: no tensor says which device they are for.
STABLE_TORCH_LIBRARY_IMPL(fastrl_cuda, CompositeExplicitAutograd, m) {
    m.impl("arena_granularity", TORCH_BOX(&fastrl::arena_granularity));
    m.impl("arena_reserve", TORCH_BOX(&fastrl::arena_reserve));
    m.impl("arena_map", TORCH_BOX(&fastrl::arena_map));
    m.impl("arena_unmap", TORCH_BOX(&fastrl::arena_unmap));
    m.impl("arena_free", TORCH_BOX(&fastrl::arena_free));
    m.impl("arena_bytes", TORCH_BOX(&fastrl::arena_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(fastrl_cuda, CUDA, m) {
    m.impl("gae", TORCH_BOX(&fastrl::run_gae));
    m.impl("kl_estimate", TORCH_BOX(&fastrl::run_kl_estimate));
    m.impl("kl_gradient", TORCH_BOX(&fastrl::run_kl_gradient));
    m.impl("shape_rewards", TORCH_BOX(&fastrl::run_shape_rewards));
    m.impl("gather_logprobs", TORCH_BOX(&fastrl::run_gather_logprobs));
    m.impl("gather_logprobs_gradient", TORCH_BOX(&fastrl::run_gather_logprobs_gradient));
    m.impl("adamw", TORCH_BOX(&fastrl::run_adamw));
    m.impl("grad_norm_parts", TORCH_BOX(&fastrl::run_grad_norm_parts));
    m.impl("grad_norm_merge", TORCH_BOX(&fastrl::run_grad_norm_merge));
    m.impl("sample_tokens", TORCH_BOX(&fastrl::run_sample_tokens));
    m.impl("write_kv", TORCH_BOX(&fastrl::run_write_kv));
    m.impl("copy_pages", TORCH_BOX(&fastrl::run_copy_pages));
}

// `import fastrl_kernels._C` loads the library, whose static objects register the ops.
PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                     nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&definition);
}
