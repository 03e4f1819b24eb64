// What kernels/threads.py asks of OpenMP.

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <system_error>
#include <thread>

#include "export.h"
#include "parallel.h"

// Have OpenMP start one thread more, which is kept for a thread that sleeps for ever. Returns 1 where there is none to
// be had.
MOESAIC_EXPORT int64_t moesaic_rest_soon() try {
    std::thread([] {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, nullptr);  // they are for the threads that do something
        GOMP_parallel([](void*) {}, nullptr, 2, 0);
        for (;;) pause();
    }).detach();
    return 0;
} catch (const std::system_error&) {
    return 1;
} MOESAIC_NO_MEMORY
