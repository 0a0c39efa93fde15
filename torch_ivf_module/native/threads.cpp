#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif

namespace torch_ivf_module {
namespace {

constexpr double kTeamPays = 1e6; // nanoseconds
constexpr double kMemberPays = 5e5; // of work for each thread
constexpr int kSpins = 500; // looks at the last items before the caller sleeps: some ten microseconds
constexpr int64_t kMostWorkers = 1024;

// Let the other thread of the core run. Not std::this_thread::yield, after which a busy process may run for milliseconds.
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Blocks all signals for the current thread, so that a thread started meanwhile leaves them to the others.
class SignalsBlocked {
#if !defined(_WIN32)
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() {
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  sigset_t before_;
#endif
};

// The items of one call. The caller and each thread that helps it share the ownership, since a thread may find that
// there is no item left after the caller has returned; it then touches nothing but this.
class Job {
 public:
  Job(int64_t count, int64_t team, RunItem run, void* context)
      : team_(team), count_(count), run_(run), context_(context) {}

  // The number of a thread that joins, or -1 if the team is complete. Called under the lock of the pool.
  int64_t join() {
    return members_ < team_ ? members_++ : -1;
  }

  void work(int64_t member) {
    for (int64_t item = next_++; item < count_; item = next_++) {
      int64_t done = 1;
      try {
        run_(context_, item, member);
      } catch (...) {
        done += stop(std::current_exception());
      }
      if ((done_ += done) == count_) {
        const std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_all();
      }
    }
  }

  void wait() {
    for (int spin = 0; spin < kSpins && done_ < count_; ++spin) {
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == count_; });
    if (error_) {
      std::rethrow_exception(error_);
    }
  }

 private:
  // Keep the first error and let nobody start another item: how many that leaves out.
  int64_t stop(std::exception_ptr error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    error_ = error_ ? error_ : error;
    return std::max<int64_t>(0, count_ - next_.exchange(count_));
  }

  const int64_t team_, count_;
  const RunItem run_;
  void* const context_;
  int64_t members_ = 1;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
  std::exception_ptr error_;
};

class Pool {
 public:
  explicit Pool(const Pool* parent) : parent_(parent) {}

  void open(const std::shared_ptr<Job>& job, int64_t helpers) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(job);
      while (workers_ < std::min(helpers, kMostWorkers) && start_worker()) {
        ++workers_;
      }
    }
    for (int64_t i = 0; i < helpers; ++i) {
      opened_.notify_one();
    }
  }

  void close(const std::shared_ptr<Job>& job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
  }

 private:
  // False if the system gives no more threads: the caller works without.
  bool start_worker() {
    try {
      const SignalsBlocked blocked;
      std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      std::shared_ptr<Job> job;
      int64_t member = -1;
      opened_.wait(lock, [&] { return (member = join_one(job)) >= 0; });
      lock.unlock();
      job->work(member);
      job.reset();
      lock.lock();
    }
  }

  // Join the job that has waited longest.
  int64_t join_one(std::shared_ptr<Job>& joined) {
    for (const std::shared_ptr<Job>& job : jobs_) {
      const int64_t member = job->join();
      if (member >= 0) {
        joined = job;
        return member;
      }
    }
    return -1;
  }

  [[maybe_unused]] const Pool* parent_; // of the process that this one was forked from, so that it is not lost
  std::mutex mutex_;
  std::condition_variable opened_;
  std::vector<std::shared_ptr<Job>> jobs_;
  int64_t workers_ = 0;
};

// Never destroyed: its threads wait for work until the process has ended.
std::atomic<Pool*> the_pool{nullptr};

Pool* create_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool = new Pool(nullptr);
#if !defined(_WIN32)
    // A child has none of its parent's threads, and a copy of a lock that one of them may have held.
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool(the_pool); });
#endif
  });
  return the_pool;
}

Pool& pool() {
  Pool* const there = the_pool;
  return there ? *there : *create_pool();
}

} // namespace

int64_t team_for(double nanoseconds, int64_t threads) {
  if (nanoseconds < kTeamPays || threads < 2) {
    return 1;
  }
  return static_cast<int64_t>(std::min(nanoseconds / kMemberPays, static_cast<double>(threads)));
}

void run_items(int64_t count, int64_t team, RunItem run, void* context) {
  if (count <= 0) {
    return;
  }
  const auto job = std::make_shared<Job>(count, std::min(team, count), run, context);
  Pool& helpers = pool();
  helpers.open(job, std::min(team, count) - 1);
  job->work(0);
  helpers.close(job);
  job->wait();
}

} // namespace torch_ivf_module
