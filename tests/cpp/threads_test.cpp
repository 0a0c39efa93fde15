// The pool of threads, to be run under ThreadSanitizer and AddressSanitizer. Prints nothing and returns 0, or says what
// is wrong and returns 1.
//
// Arguments: "fork" runs what a sanitizer may not support.

#include "threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

using torch_ivf_module::parallel_items;
using torch_ivf_module::team_for;

namespace {

void expect(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "not so: %s\n", what);
    std::exit(1);
  }
}

// Every item once, with plain writes that the caller reads afterwards.
void each_item_once(int64_t count, int64_t team) {
  std::vector<int> times(count, 0);
  std::vector<int64_t> by_member(team, 0);
  parallel_items(count, team, [&](int64_t item, int64_t member) {
    ++times[item];
    ++by_member[member]; // no other thread has this number
  });
  int64_t total = 0;
  for (int64_t member : by_member) {
    total += member;
  }
  expect(total == count, "the members together process all items");
  for (int time : times) {
    expect(time == 1, "each item is processed once");
  }
}

void many_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 6; ++i) {
    callers.emplace_back([i] {
      for (int round = 0; round < 300; ++round) {
        each_item_once(1 + (round * 7 + i) % 40, 2 + i % 4);
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
}

// More than one thread takes part while the caller is held up.
void others_join() {
  std::atomic<int> other{0};
  parallel_items(2, 2, [&](int64_t, int64_t member) {
    other += member != 0;
    const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (member == 0 && other == 0 && std::chrono::steady_clock::now() < late) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  expect(other >= 1, "a thread of the pool joins in");
}

void errors_reach_the_caller() {
  for (int64_t team : {1, 4}) {
    for (int64_t bad = 0; bad < 50; bad += 7) {
      std::atomic<int64_t> last{-1};
      try {
        parallel_items(50, team, [&](int64_t item, int64_t) {
          if (item == bad) {
            throw std::runtime_error("item");
          }
          last = item;
        });
        expect(false, "an exception in an item is rethrown");
      } catch (const std::runtime_error& error) {
        expect(std::strcmp(error.what(), "item") == 0, "the exception is the item's own");
      }
    }
  }
  each_item_once(100, 4);
}

void calls_within_items() {
  std::atomic<int64_t> total{0};
  parallel_items(8, 3, [&](int64_t, int64_t) {
    parallel_items(8, 3, [&](int64_t item, int64_t) { total += item; });
  });
  expect(total == 8 * 28, "items may have items of their own");
}

void teams() {
  expect(team_for(5e5, 8) == 1, "no team for half a millisecond");
  expect(team_for(1.5e6, 8) == 3, "a thread for each half millisecond");
  expect(team_for(1e9, 8) == 8, "at most all threads");
  expect(team_for(1e9, 1) == 1, "one thread stays alone");
}

// A child has no threads of the pool until it starts its own, and the parent's go on.
void children() {
  each_item_once(100, 3);
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      others_join();
      many_callers();
      std::exit(0);
    }
    each_item_once(100, 3);
    int status = 1;
    expect(waitpid(child, &status, 0) == child && status == 0, "a child can do the same");
  }
}

// Fork while other threads are in the middle of calls.
void children_of_a_busy_parent() {
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) {
      each_item_once(40, 4);
    }
  });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      each_item_once(100, 4);
      std::_Exit(0);
    }
    int status = 1;
    expect(waitpid(child, &status, 0) == child && status == 0, "a child of a busy parent can do the same");
  }
  stop = true;
  busy.join();
}

} // namespace

int main(int argc, char** argv) {
  teams();
  for (int64_t count : {0, 1, 2, 3, 1000}) {
    for (int64_t team : {1, 2, 5}) {
      each_item_once(count, team);
    }
  }
  others_join();
  many_callers();
  errors_reach_the_caller();
  calls_within_items();
  if (argc > 1 && std::strcmp(argv[1], "fork") == 0) {
    children();
    children_of_a_busy_parent();
  }
  return 0;
}
