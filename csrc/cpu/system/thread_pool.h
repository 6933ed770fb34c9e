// Runs numbered tasks on a few threads. Which thread runs a task never changes its result, so drivers that cut their
// work by sizes alone give the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <exception>
#include <type_traits>
#include <utility>

namespace csdiv::cpu {

// A reference to a callable: no allocation, valid while the callable lives.
class TaskRef {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, TaskRef>>>
  TaskRef(F&& f)
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, int64_t task) { (*static_cast<std::remove_reference_t<F>*>(object))(task); }) {}

  void operator()(int64_t task) const { call_(object_, task); }

 private:
  void* object_;
  void (*call_)(void*, int64_t);
};

// Calls run(0) ... run(tasks - 1) on up to `threads` threads, the caller's among them, and returns when all are done.
// Serial when there is one task or thread, inside another parallel_for, and while another Python thread has the pool.
// The first exception is rethrown. Every task begins with an interruption_point(). A forked child starts a pool of its
// own.
void parallel_for(int64_t tasks, int threads, TaskRef run);

// Elements of a problem from which it gains by a second thread, by what parallel_for takes to call one: measured on
// first use, on threads that wait for work, as they do between the operators of a network.
double worthwhile_elements();

// From now on tasks run on the OpenMP threads of this process, if its library can be found. PyTorch computes on them,
// and for milliseconds after an operator they spin in wait for the next one: other threads would find no processor
// free. A forked child has to call this again, which it may if the library was told to release its threads before
// (csdiv/process.py): otherwise the library would wait for threads that are gone.
bool share_openmp_threads();

// While it lives, this thread calls wanted() every 50 ms, in interruption points, and where that returns true the call
// under way ends: Interrupted is thrown. Null: it does not end early.
class Interruptible {
 public:
  explicit Interruptible(bool (*wanted)());
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;
  ~Interruptible();

  // Whether this thread is inside of wanted(): the call that may end still has the thread's scratch memory.
  static bool asking();
};

struct Interrupted : std::exception {};

// To be called at least every few milliseconds of work. Throws Interrupted if the call is to end, also on threads that
// help with it.
void interruption_point();

}   // namespace csdiv::cpu
