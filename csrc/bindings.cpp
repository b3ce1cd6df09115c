// Schemas and registration of the ops in torch.ops.fastrl_cuda. Every op writes into tensors that
// the caller allocated, on the stream that the caller passes (a cudaStream_t as an integer).
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

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
             const Tensor advantages, const Tensor returns, const std::optional<Tensor> row_stats,
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
        static_cast<double*>(
            data(op, "row_stats", row_stats, ScalarType::Double, 3 * num_rows, rewards)),
        on_stream(rewards, stream)));
}

}  // namespace
}  // namespace fastrl

STABLE_TORCH_LIBRARY(fastrl_cuda, m) {
    m.def("gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, float gamma, "
          "float decay, Tensor(a!) advantages, Tensor(b!) returns, Tensor(c!)? row_stats, "
          "int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastrl_cuda, CUDA, m) {
    m.impl("gae", TORCH_BOX(&fastrl::run_gae));
}

// `import fastrl_kernels._C` loads the library, whose static objects register the ops.
PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                     nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&definition);
}
