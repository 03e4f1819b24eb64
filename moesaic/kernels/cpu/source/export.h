// What the library shows: plain C functions that ctypes calls with addresses and 64-bit integers.
//
// Its body is a try block with MOESAIC_NO_MEMORY behind it: no exception passes through ctypes, and one for lack of memory
// becomes a number that build.py knows and nothing else returns.
#pragma once

#include <cstdint>
#include <new>

#define MOESAIC_EXPORT extern "C" __attribute__((visibility("default")))
#define MOESAIC_NO_MEMORY \
    catch (const std::bad_alloc&) { return INT64_MIN; }
