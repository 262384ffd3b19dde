#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#include <pthread.h>

namespace lingbot::cpu {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kBytesPerThread = 128 << 10;  // about 10 us of memory traffic: what waking a thread costs
constexpr int kBlocksPerThread = 4;             // evens out threads that were held up

struct Job {
  Body body;
  const void* context;
  int64_t count;
  int64_t block;
  std::atomic<int64_t> next{0};

  void drain() {
    for (;;) {
      const int64_t begin = next.fetch_add(block, std::memory_order_relaxed);
      if (begin >= count) return;
      body(context, begin, std::min(begin + block, count));
    }
  }
};

class Pool {
 public:
  bool try_acquire() { return submit_.try_lock(); }
  void release() { submit_.unlock(); }

  void run(Job& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      job_ = &job;
      tickets_ = std::min(helpers, size_);
    }
    wake_.notify_all();
    job.drain();
    std::unique_lock<std::mutex> lock(mutex_);
    tickets_ = 0;  // a thread that has not woken yet is not waited for
    done_.wait(lock, [this] { return active_ == 0; });
    job_ = nullptr;
  }

 private:
  void grow(int wanted) {
    try {
      for (; size_ < wanted; ++size_) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {  // a limit on threads: the ones there are do the work
    }
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return tickets_ > 0; });
      --tickets_;
      ++active_;
      Job* job = job_;
      lock.unlock();
      job->drain();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex submit_;  // one job at a time
  std::mutex mutex_;   // guards what follows
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int tickets_ = 0;
  int active_ = 0;
  int size_ = 0;
};

// Never destroyed: its threads may outlive static destructors. A forked child has none of them and starts its own pool.
std::atomic<Pool*> g_pool{nullptr};

Pool* pool() {
  Pool* current = g_pool.load(std::memory_order_acquire);
  if (current != nullptr) return current;
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); }); });
  Pool* fresh = new Pool;
  if (g_pool.compare_exchange_strong(current, fresh)) return fresh;
  delete fresh;
  return current;
}

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(CPU_COUNT(&set), 1);
#endif
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

}  // namespace

void run_blocks(int64_t count, int64_t bytes_each, int threads, Body body, const void* context) {
  if (count <= 0) return;
  const int64_t by_work = std::min(count, count * std::max<int64_t>(bytes_each, 1) / kBytesPerThread);
  if (by_work > 1 && threads != 1) {
    const int wanted =
        static_cast<int>(std::min<int64_t>({by_work, threads > 0 ? threads : usable_cores(), kMaxThreads}));
    Pool* workers = wanted > 1 ? pool() : nullptr;
    if (workers != nullptr && workers->try_acquire()) {
      Job job{body, context, count, std::max<int64_t>(count / (int64_t{wanted} * kBlocksPerThread), 1)};
      workers->run(job, wanted - 1);
      workers->release();
      return;
    }
  }
  body(context, 0, count);
}

}  // namespace lingbot::cpu
