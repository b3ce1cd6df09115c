// Virtual memory of the CUDA driver. The driver's library is opened when the first range is asked
// for, so that a machine without one can load the extension.
#include "arena.h"

#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastrl {
namespace {

template <typename Function>
Function* symbol(const char* name) {
    static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw std::runtime_error(
            "arena: expected the CUDA driver's library libcuda.so.1, but " +
            std::string(dlerror()) + "; install the NVIDIA driver");
    }
    void* const found = dlsym(library, name);
    if (found == nullptr) {
        throw std::runtime_error("arena: expected a CUDA driver with " + std::string(name) +
                                 ", which this one lacks; install driver 450 or later");
    }
    return reinterpret_cast<Function*>(found);
}

#define DRIVER(name) symbol<decltype(name)>(#name)

void require(CUresult result, const char* call, int64_t num_bytes, const std::string& advice) {
    if (result == CUDA_SUCCESS) return;
    const char* name = nullptr;
    const char* text = nullptr;
    DRIVER(cuGetErrorName)(result, &name);
    DRIVER(cuGetErrorString)(result, &text);
    throw std::runtime_error("arena: " + std::string(call) + " of " + std::to_string(num_bytes) +
                             " bytes: " + (name == nullptr ? "unknown error" : name) + " (" +
                             (text == nullptr ? "no text" : text) + "); " + advice);
}

CUmemAllocationProp memory_of(int64_t device) {
    CUmemAllocationProp properties = {};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = static_cast<int>(device);
    return properties;
}

CUdeviceptr pointer(int64_t address) { return static_cast<CUdeviceptr>(address); }

// One piece: its memory belongs to the mapping alone, and goes when that goes.
void map_piece(CUdeviceptr place, int64_t num_bytes, const CUmemAllocationProp& properties) {
    static const auto create = DRIVER(cuMemCreate);
    static const auto map = DRIVER(cuMemMap);
    static const auto release = DRIVER(cuMemRelease);
    CUmemGenericAllocationHandle memory;
    require(create(&memory, static_cast<size_t>(num_bytes), &properties, 0), "cuMemCreate",
            num_bytes, "lower num_pages, max_batch_size or max_new_tokens, or free memory first");
    const CUresult mapped = map(place, static_cast<size_t>(num_bytes), 0, memory, 0);
    release(memory);
    require(mapped, "cuMemMap", num_bytes, "is the range mapped already?");
}

}  // namespace

int64_t arena_granularity(int64_t device) {
    const std::string advice = "is the device number right?";
    require(DRIVER(cuInit)(0), "cuInit", 0, "check the driver with nvidia-smi");
    CUdevice handle;
    require(DRIVER(cuDeviceGet)(&handle, static_cast<int>(device)), "cuDeviceGet", 0, advice);
    int is_supported = 0;
    require(DRIVER(cuDeviceGetAttribute)(
                &is_supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, handle),
            "cuDeviceGetAttribute", 0, advice);
    if (is_supported == 0) return 0;
    size_t granularity = 0;
    const CUmemAllocationProp properties = memory_of(device);
    require(DRIVER(cuMemGetAllocationGranularity)(&granularity, &properties,
                                                  CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
            "cuMemGetAllocationGranularity", 0, advice);
    return static_cast<int64_t>(granularity);
}

int64_t arena_reserve(int64_t num_bytes) {
    CUdeviceptr address = 0;
    require(DRIVER(cuMemAddressReserve)(&address, static_cast<size_t>(num_bytes), 0, 0, 0),
            "cuMemAddressReserve", num_bytes, "lower num_pages");
    return static_cast<int64_t>(address);
}

void arena_unmap(int64_t address, int64_t num_bytes) {
    static const auto unmap = DRIVER(cuMemUnmap);
    for (int64_t begin = 0; begin < num_bytes; begin += ARENA_PIECE) {
        const int64_t size = std::min(ARENA_PIECE, num_bytes - begin);
        require(unmap(pointer(address + begin), static_cast<size_t>(size)), "cuMemUnmap", size,
                "is the range mapped?");
    }
}

void arena_map(int64_t address, int64_t num_bytes, int64_t device) {
    const CUmemAllocationProp properties = memory_of(device);
    int64_t done = 0;
    try {
        while (done < num_bytes) {
            const int64_t size = std::min(ARENA_PIECE, num_bytes - done);
            map_piece(pointer(address + done), size, properties);
            done += size;
        }
        CUmemAccessDesc access = {};
        access.location = properties.location;
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        require(DRIVER(cuMemSetAccess)(pointer(address), static_cast<size_t>(num_bytes), &access,
                                       1),
                "cuMemSetAccess", num_bytes, "free memory on the GPU and try again");
    } catch (...) {
        arena_unmap(address, done);
        throw;
    }
}

void arena_free(int64_t address, int64_t num_bytes) {
    require(DRIVER(cuMemAddressFree)(pointer(address), static_cast<size_t>(num_bytes)),
            "cuMemAddressFree", num_bytes, "unmap the range first");
}

}  // namespace fastrl
