// Work items that the calling thread processes, with the help of a pool of threads.
//
// The caller takes items from a shared counter until none is left, and so does every thread of the pool that joins it.
// At the end it waits only for items that another thread has started, never for a thread that the system has not
// scheduled: a busy machine delays a search by one item at most. Any number of threads may call at the same time; the
// pool helps them in turn.
#pragma once

#include <cstdint>

namespace torch_ivf_module {

// Threads, the caller among them, that work of so many nanoseconds is worth: below one millisecond waking another one
// costs more than it saves. At most `threads`.
int64_t team_for(double nanoseconds, int64_t threads);

using RunItem = void (*)(void* context, int64_t item, int64_t member);

// Call run(context, item, member) for every item below `count`, by at most `team` threads at a time. `member` is below
// `team` and different for each thread, 0 for the caller. Rethrows the first exception; items not yet started are then
// left out. No thread uses `context` after the return.
void run_items(int64_t count, int64_t team, RunItem run, void* context);

// The same for job(item, member).
template <typename Job>
void parallel_items(int64_t count, int64_t team, const Job& job) {
  if (team <= 1 || count <= 1) {
    for (int64_t item = 0; item < count; ++item) {
      job(item, int64_t{0});
    }
    return;
  }
  const RunItem run = [](void* context, int64_t item, int64_t member) {
    (*static_cast<const Job*>(context))(item, member);
  };
  run_items(count, team, run, const_cast<Job*>(&job));
}

} // namespace torch_ivf_module
