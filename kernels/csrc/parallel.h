// Threads of the OpenMP runtime that torch has loaded: the same pool, so that two never compete for the cores.
//
// What a compiler makes of `#pragma omp parallel` is called by name here, and the library is linked to no runtime:
// the name is found in torch's when the library is loaded, whichever compiler built it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

namespace {

// body(thread) on each of `threads` threads, numbered from 0
template <class Body>
void on_threads(int threads, Body& body) {
    if (threads <= 1) {
        body(0);
        return;
    }
    struct Job {
        Body* body;
        int next;
    } job{&body, 0};
    GOMP_parallel(
        [](void* data) {
            Job* job = (Job*)data;
            (*job->body)(__atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED));
        },
        &job, (unsigned)threads, 0);
}

// the next number below `count` that no other thread has; -1 if there is none
inline int64_t take(int64_t& taken, int64_t count) {
    const int64_t number = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
    return number < count ? number : -1;
}

// body(thread, task) for each task; whoever is free takes the next
template <class Body>
void for_tasks(int threads, int64_t tasks, Body&& body) {
    int64_t taken = 0;
    auto work = [&](int thread) {
        for (int64_t task; (task = take(taken, tasks)) >= 0;) body(thread, task);
    };
    on_threads(tasks < threads ? (int)tasks : threads, work);
}

// body(first, last) over ranges of 0 .. n - 1, with no more threads than there are pieces of `grain`
template <class Body>
void for_ranges(int threads, int64_t n, int64_t grain, Body&& body) {
    if (grain < 1) grain = 1;
    if (n / grain < threads) threads = n < 2 * grain ? 1 : (int)(n / grain);
    auto work = [&](int thread) { body(n * thread / threads, n * (thread + 1) / threads); };
    on_threads(threads, work);
}

// Memory that is kept for the next call, aligned to a cache line. One per calling thread.
struct Arena {
    char* start = nullptr;
    size_t size = 0;
    size_t used = 0;

    ~Arena() { operator delete[](start, std::align_val_t(64)); }

    void reserve(size_t bytes) {
        used = 0;
        if (bytes <= size) return;
        operator delete[](start, std::align_val_t(64));
        start = nullptr;
        size = 0;
        start = (char*)operator new[](bytes, std::align_val_t(64));
        size = bytes;
    }
    template <class T>
    static size_t bytes_for(size_t count) {
        return (count * sizeof(T) + 63) / 64 * 64;
    }
    template <class T>
    T* take(size_t count) {
        T* at = (T*)(start + used);
        used += bytes_for<T>(count);
        return at;
    }
};

}  // namespace
