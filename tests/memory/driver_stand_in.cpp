// Stands in for the CUDA driver where there is none: it notes every call, sizes in MiB, and refuses
// the call that FAILING names ("cuMemCreate 3": the third of that name).
#include <cuda.h>

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <map>
#include <string>

namespace {

std::map<std::string, int> counts;
int64_t held = 0;    // bytes of memory that a handle or a mapping holds
int64_t newest = 0;  // size of the memory of the newest handle
bool is_mapped = false;

CUresult note(const std::string& name, size_t num_bytes = 0) {
    std::cout << name;
    if (num_bytes != 0) std::cout << ' ' << (num_bytes >> 20);
    std::cout << '\n';
    const char* failing = std::getenv("FAILING");
    const std::string call = name + ' ' + std::to_string(++counts[name]);
    return failing != nullptr && call == failing ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) {
    *value = 1;
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp*,
                                       CUmemAllocationGranularity_flags) {
    *granularity = 2 << 20;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult, const char** name) {
    *name = "CUDA_ERROR_OUT_OF_MEMORY";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "no memory";
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t, CUdeviceptr,
                             unsigned long long) {
    *address = 1 << 21;
    return note("cuMemAddressReserve", size);
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp*,
                     unsigned long long) {
    *handle = 1;
    const CUresult result = note("cuMemCreate", size);
    if (result == CUDA_SUCCESS) held += newest = static_cast<int64_t>(size);
    is_mapped = false;
    return result;
}

CUresult cuMemMap(CUdeviceptr, size_t size, size_t, CUmemGenericAllocationHandle,
                  unsigned long long) {
    const CUresult result = note("cuMemMap", size);
    is_mapped = result == CUDA_SUCCESS;
    return result;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle) {
    if (!is_mapped) held -= newest;
    return note("cuMemRelease");
}

CUresult cuMemSetAccess(CUdeviceptr, size_t size, const CUmemAccessDesc*, size_t) {
    return note("cuMemSetAccess", size);
}

CUresult cuMemUnmap(CUdeviceptr, size_t size) {
    held -= static_cast<int64_t>(size);
    return note("cuMemUnmap", size);
}

CUresult cuMemAddressFree(CUdeviceptr, size_t size) { return note("cuMemAddressFree", size); }

int64_t stand_in_held() { return held; }

}
