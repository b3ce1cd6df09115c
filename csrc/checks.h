// Checks of the tensors that reach a launcher, with messages a reader can act on.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace fastrl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool holds, const char* op, const char* name, const std::string& expected) {
    if (!holds) throw std::runtime_error(std::string(op) + ": expected " + name + " " + expected);
}

// The data of a contiguous tensor of `numel` elements of `dtype` on the device of `like`.
inline void* data(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  int64_t numel, const Tensor& like) {
    require(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), op, name,
            "on the GPU of the first argument; move it with .to(device)");
    require(tensor.scalar_type() == dtype, op, name, "of another dtype; see the op's schema");
    require(tensor.numel() == numel, op, name,
            "of " + std::to_string(numel) + " elements, got " + std::to_string(tensor.numel()));
    require(tensor.is_contiguous(), op, name, "contiguous; call .contiguous()");
    return tensor.data_ptr();
}

inline void* data(const char* op, const char* name, const std::optional<Tensor>& tensor,
                  ScalarType dtype, int64_t numel, const Tensor& like) {
    return tensor.has_value() ? data(op, name, *tensor, dtype, numel, like) : nullptr;
}

// The logits [M, V] of an op, or what has their shape and type.
inline void* logit_rows(const char* op, const char* name, const Tensor& tensor,
                        const Tensor& like) {
    require(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), op, name,
            "on the GPU of the first argument; move it with .to(device)");
    require(tensor.dim() == 2 && tensor.size(0) == like.size(0) && tensor.size(1) == like.size(1),
            op, name, "[M, V]");
    require(tensor.scalar_type() == like.scalar_type(), op, name, "of the dtype of the logits");
    require(tensor.size(1) <= 1 || tensor.stride(1) == 1, op, name,
            "with neighbours in a row side by side; call .contiguous()");
    return tensor.data_ptr();
}

}  // namespace fastrl
