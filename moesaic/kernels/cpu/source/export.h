// What the library shows: plain C functions that ctypes calls with addresses and 64-bit integers.
#pragma once

#define MOESAIC_EXPORT extern "C" __attribute__((visibility("default")))
