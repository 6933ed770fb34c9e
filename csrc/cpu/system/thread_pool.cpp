#include "cpu/system/thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <ctime>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace csdiv::cpu {
namespace {

constexpr int kMaxThreads = 256;
constexpr auto kSpinTime = std::chrono::microseconds(30);   // longer than the gap between two phases of one call

constexpr int64_t kMsBetweenQuestions = 50;

#ifdef CLOCK_MONOTONIC_COARSE
constexpr clockid_t kClock = CLOCK_MONOTONIC_COARSE;   // in steps of a few ms, for a fifth of the cost
#else
constexpr clockid_t kClock = CLOCK_MONOTONIC;
#endif

int64_t milliseconds() {
  timespec now;
  clock_gettime(kClock, &now);
  return int64_t(now.tv_sec) * 1000 + now.tv_nsec / 1'000'000;
}

// Whether the call of this thread is to end.
struct Question {
  bool (*wanted)() = nullptr;   // null: never
  int64_t due = 0;
  bool asking = false;
};
thread_local Question question;

// One parallel_for call: tasks are claimed from a counter.
struct Job {
  Job(int64_t tasks, TaskRef run) : tasks(tasks), run(run) {}

  void work() {
    current = this;
    active.fetch_add(1, std::memory_order_relaxed);
    claim_tasks();
    // The others may be in long tasks, during which this thread must be able to end the call.
    while (question.wanted && active.load(std::memory_order_relaxed) > 1) {
      std::this_thread::yield();
      if (!failed.load(std::memory_order_relaxed)) attempt([] { interruption_point(); });
    }
    active.fetch_sub(1, std::memory_order_relaxed);
    current = nullptr;
  }

  void claim_tasks() {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      attempt([&] {
        interruption_point();
        run(task);
      });
    }
  }

  template <class F>
  void attempt(F step) {
    try {
      step();
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      next.store(tasks, std::memory_order_relaxed);
    }
  }

  static thread_local const Job* current;   // whose task this thread is in

  const int64_t tasks;
  const TaskRef run;
  std::atomic<int64_t> next{0};
  std::atomic<int> active{0};   // threads in work()
  std::atomic<bool> failed{false};
  std::exception_ptr error;
};
thread_local const Job* Job::current = nullptr;

template <class Condition>
bool spin_until(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

class ThreadPool {
 public:
  explicit ThreadPool(pid_t pid) : pid(pid) {}

  const pid_t pid;

  // False when another caller has the pool.
  bool run(Job& job, int helpers) {
    std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (!caller.owns_lock()) return false;
    grow(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      places_ = helpers;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;   // from here on nobody joins
    }
    const auto idle = [this] { return running_.load(std::memory_order_acquire) == 0; };
    if (!spin_until(idle)) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, idle);
    }
    return true;
  }

 private:
  void grow(int helpers) {
    while (static_cast<int>(workers_.size()) < helpers) workers_.emplace_back([this] { serve(); });
  }

  void serve() {
    for (uint64_t seen = 0;;) {
      const auto changed = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      spin_until(changed);
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, changed);
      seen = generation_.load(std::memory_order_relaxed);
      Job* const job = job_;
      if (!job || places_ == 0) continue;
      --places_;
      running_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job->work();
      lock.lock();
      if (running_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  std::mutex caller_;   // held by the parallel_for call that uses the pool
  std::mutex mutex_;    // guards job_ and places_
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> running_{0};
  Job* job_ = nullptr;
  int places_ = 0;   // helpers that may still join
  std::vector<std::thread> workers_;
};

// Never destroyed: its threads wait until the process ends. After fork() only the forking thread exists, so the child
// abandons its copy, whose locks may be held for ever.
ThreadPool& pool() {
  static std::atomic<ThreadPool*> instance{nullptr};
  ThreadPool* current = instance.load(std::memory_order_acquire);
  const pid_t pid = getpid();
  while (!current || current->pid != pid) {
    auto* const fresh = new ThreadPool(pid);
    if (instance.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

// The entry of OpenMP's run-time library: runs function(data) on a team of threads, this one among them.
using OpenMp = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<OpenMp> openmp{nullptr};

}   // namespace

bool share_openmp_threads() {
  const auto found = reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  const bool survives_forks = dlsym(RTLD_DEFAULT, "omp_pause_resource_all");
  // In a forked child the library may wait for threads that are gone.
  static const int error = pthread_atfork(nullptr, nullptr, [] { openmp = nullptr; });
  if (!found || !survives_forks || error) return false;
  openmp = found;
  return true;
}

void parallel_for(int64_t tasks, int threads, TaskRef run) {
  const int64_t useful = std::min<int64_t>({tasks, threads, kMaxThreads});
  if (useful > 1 && !Job::current) {
    Job job(tasks, run);
    const OpenMp team = openmp;
    if (team) team([](void* shared) { static_cast<Job*>(shared)->work(); }, &job, static_cast<unsigned>(useful), 0);
    if (team || pool().run(job, static_cast<int>(useful) - 1)) {
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  for (int64_t task = 0; task < tasks; ++task) {
    interruption_point();
    run(task);
  }
}

double worthwhile_elements() {
  constexpr int kTrials = 32;
  constexpr double kCallsOfAProblem = 8, kElementsPerNs = 2;   // fewer elements, so that a core is gained and not lost
  constexpr double kLeast = 1 << 14, kMost = 1 << 20;
  // No static that a lock guards: in a forked child its holder may be gone. Threads that come at once all measure.
  static std::atomic<double> known{0};
  if (const double elements = known.load(std::memory_order_relaxed)) return elements;
  double least = 1e9;
  for (int k = 0; k < kTrials; ++k) {
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(2, 2, [](int64_t) {});
    least = std::min(least, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count());
  }
  const double elements = std::min(std::max(kCallsOfAProblem * kElementsPerNs * least, kLeast), kMost);
  known.store(elements, std::memory_order_relaxed);
  return elements;
}

Interruptible::Interruptible(bool (*wanted)()) {
  question = {wanted, wanted ? milliseconds() + kMsBetweenQuestions : 0};
}

Interruptible::~Interruptible() {
  question = {};
}

bool Interruptible::asking() {
  return question.asking;
}

void interruption_point() {
  if (Job::current && Job::current->failed.load(std::memory_order_relaxed)) throw Interrupted();
  if (!question.wanted || milliseconds() < question.due) return;
  question.asking = true;
  const bool wanted = question.wanted();
  question.asking = false;
  question.due = milliseconds() + kMsBetweenQuestions;
  if (wanted) throw Interrupted();
}

}   // namespace csdiv::cpu
