// Reserves, maps, unmaps and frees a range of some GiB, and says what happens.
#include <dlfcn.h>

#include <cstdlib>
#include <exception>
#include <iostream>

#include "arena.h"

int main(int, char** arguments) {
    using namespace fastrl;
    try {
        const int64_t size = std::atoll(arguments[1]) << 30;
        if (arena_granularity(0) != 2 << 20) return 1;
        const int64_t address = arena_reserve(size);
        try {
            std::cout << "map\n";
            arena_map(address, size, 0);
            std::cout << "mapped\n";
            std::cout << "unmap\n";
            arena_unmap(address, size);
            std::cout << "unmapped\n";
        } catch (const std::exception& error) {
            std::cout << "error: " << error.what() << '\n';
        }
        arena_free(address, size);
        void* driver = dlopen("libcuda.so.1", RTLD_NOW);
        const auto held = reinterpret_cast<int64_t (*)()>(dlsym(driver, "stand_in_held"));
        std::cout << "left " << held() << '\n';
    } catch (const std::exception& error) {
        std::cout << "error: " << error.what() << '\n';
    }
    return 0;
}
