// Threads of the OpenMP runtime that torch has loaded: the same pool, so that two never compete for the cores.
//
// What a compiler makes of `#pragma omp parallel` is called by name here, and the library is linked to no runtime:
// the name is found in torch's when the library is loaded, whichever compiler built it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

namespace {

// Run body(thread) on each of `threads` threads, numbered from 0.
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

// Run body(thread, task) for each task; a free thread takes the next task.
template <class Body>
void for_tasks(int threads, int64_t tasks, Body&& body) {
    int64_t taken = 0;
    auto work = [&](int thread) {
        for (int64_t task; (task = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < tasks;) body(thread, task);
    };
    on_threads(tasks < threads ? (int)tasks : threads, work);
}

// Tasks 0 .. tasks - 1, of which each thread has a share that lies together: what it reads for one task after another, and
// what it writes, is then near in its own caches. Who has done its own helps with the others', from their ends.
struct Shares {
    struct Range {
        int64_t first, end;

        int64_t size() const { return end - first; }
    };

    Shares(int threads, int64_t tasks) : count(threads < MOST ? threads : MOST), tasks(tasks) {
        for (int share = 0; share < count; share++) shares[share].left = packed(all(share));
    }
    Range all(int share) const { return {tasks * share / count, tasks * (share + 1) / count}; }
    Range left(int share) const { return unpacked(__atomic_load_n(&shares[share].left, __ATOMIC_RELAXED)); }

    // the first that is left, if it is before `end`, or the last, if it is not before `first`; -1 if there is none
    int64_t take_first(int share, int64_t end) {
        return take(share, [=](Range& left) { return left.first < end ? left.first++ : -1; });
    }
    int64_t take_last(int share, int64_t first) {
        return take(share, [=](Range& left) { return left.end > first ? --left.end : -1; });
    }

    const int count;

private:
    static constexpr int MOST = 64;  // with more threads, some have one together
    struct alignas(64) Share {
        uint64_t left;  // a Range of 32 bits each, so that both are read and changed at once
    };

    static uint64_t packed(Range range) { return (uint64_t)range.first << 32 | (uint64_t)range.end; }
    static Range unpacked(uint64_t range) { return {(int64_t)(range >> 32), (int64_t)(uint32_t)range}; }
    template <class From>
    int64_t take(int share, From&& from) {
        constexpr auto RELAXED = __ATOMIC_RELAXED;
        uint64_t* const left = &shares[share].left;
        for (uint64_t before = __atomic_load_n(left, RELAXED);;) {
            Range range = unpacked(before);
            const int64_t task = range.size() > 0 ? from(range) : -1;
            if (task < 0 || __atomic_compare_exchange_n(left, &before, packed(range), true, RELAXED, RELAXED)) return task;
        }
    }

    const int64_t tasks;
    Share shares[MOST];
};

// body(task, the task that this thread will probably do next) for each task, in shares
template <class Body>
void for_shares(int threads, int64_t tasks, Body&& body) {
    threads = tasks < threads ? (int)tasks : threads;
    Shares shares(threads, tasks);
    auto work = [&](int thread) {
        const int own = thread % shares.count;
        for (int64_t task; (task = shares.take_first(own, tasks)) >= 0;) body(task, std::min(task + 1, tasks - 1));
        for (int other = 0; other < shares.count; other++) {
            for (int64_t task; (task = shares.take_last(other, 0)) >= 0;) body(task, std::max<int64_t>(task - 1, 0));
        }
    };
    on_threads(threads, work);
}

// body(first, last) over ranges of 0 .. n - 1, with no more threads than there are pieces of `grain`
template <class Body>
void for_ranges(int threads, int64_t n, int64_t grain, Body&& body) {
    if (grain < 1) grain = 1;
    if (n / grain < threads) threads = n < 2 * grain ? 1 : (int)(n / grain);
    auto work = [&](int thread) { body(n * thread / threads, n * (thread + 1) / threads); };
    on_threads(threads, work);
}

// Scratch memory reused by the next call, aligned to a cache line; one per calling thread.
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
