// A scan of inverted lists that stores no scores: products stay in registers until it is known whether a row is among a
// query's best. Registered as torch.ops.torch_ivf_module.scan and .exact_scores; see scan.py for their meaning.
//
// Q queries, L lists, P probes, N vectors, d dim, k results, T tasks (a query and one of its lists).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>

#include "best.h"
#include "products.h"

namespace torch_ivf_module {
namespace {

// Visitors from which laying a list's rows out as panels pays. It costs as much as some ten products with every row,
// and a product with a panel takes nine tenths of the time of one along d.
constexpr int64_t kPackPays = 24;
constexpr int64_t kAhead = 8 * kRows; // rows fetched ahead where they are read once
// Bytes of panels at a time: with the queries that are multiplied with them they stay in a second-level cache.
constexpr int64_t kSectionBytes = 128 << 10;
// Tasks of a list and thread from which threads divide the queries: every thread then reads and packs the lists for
// itself. With fewer they divide the rows, and keep the best of every query each.
constexpr int64_t kShareQueries = 64;
// Tasks of a list that one block of queries should have, where there are enough for more blocks than threads.
constexpr int64_t kBlockTasks = 256;

struct Problem {
  const float* x; // (Q, d)
  const float* bias; // (N,) or null
  const int64_t* offsets; // (L + 1,)
  const int64_t* sizes; // (L + 1,)
  const int64_t* probed; // (Q, P)
  const int64_t* limits; // (Q, P) or null
  int64_t queries, lists, probes, d, k;
};

struct Task {
  int32_t query; // counted in its block
  int32_t limit; // the first so many rows of the list count
};

// The tasks of some queries, list by list.
struct Tasks {
  int64_t first_query;
  std::vector<int32_t> lists; // that have tasks, those that are nearest to some query first
  std::vector<int64_t> starts; // (L + 1,)
  std::vector<Task> tasks; // (T,) in the order of the lists' numbers

  int64_t count(int32_t list) const {
    return starts[list + 1] - starts[list];
  }
};

// The probes [probe, last_probe) of queries [query, last_query).
Tasks tasks_of(const Problem& p, int64_t query, int64_t last_query, int64_t probe, int64_t last_probe) {
  Tasks out{query, {}, std::vector<int64_t>(p.lists + 2, 0), {}};
  for (int64_t j = probe; j < last_probe; ++j) {
    for (int64_t q = query; q < last_query; ++q) {
      const int64_t list = p.probed[q * p.probes + j];
      if (list < p.lists && out.starts[list + 1]++ == 0) {
        out.lists.push_back(static_cast<int32_t>(list));
      }
    }
  }
  for (int64_t l = 0; l < p.lists; ++l) {
    out.starts[l + 1] += out.starts[l];
  }
  out.tasks.resize(out.starts[p.lists]);
  std::vector<int64_t> at(out.starts.begin(), out.starts.end());
  for (int64_t q = query; q < last_query; ++q) {
    for (int64_t j = probe; j < last_probe; ++j) {
      const int64_t list = p.probed[q * p.probes + j];
      if (list < p.lists) {
        const int64_t limit = p.limits ? std::min(p.limits[q * p.probes + j], p.sizes[list]) : p.sizes[list];
        out.tasks[at[list]++] = {static_cast<int32_t>(q - query), static_cast<int32_t>(limit)};
      }
    }
  }
  if (p.limits) {
    for (int32_t list : out.lists) {
      std::sort(out.tasks.begin() + out.starts[list], out.tasks.begin() + out.starts[list + 1], [](Task a, Task b) {
        return a.limit > b.limit;
      });
    }
  }
  return out;
}

struct Scratch {
  std::vector<float> rows, panels, bias;

  static float* take(std::vector<float>& from, int64_t count) {
    if (static_cast<int64_t>(from.size()) < count) {
      from.resize(count);
    }
    return from.data();
  }
};

// Some tasks of one list, and the rows that they are to be multiplied with.
struct Visit {
  const Task* tasks;
  int64_t count;
  int64_t start; // of the list in the packed rows
  int64_t first, last; // rows, counted in the list
};

// Rarely called: most rows are not among the best.
C10_NOINLINE void offer_found(const std::array<Vec, 2>& found, Task task, int64_t start, int64_t row, Best& best) {
  float scores[kPanel];
  found[0].store(scores);
  found[1].store(scores + kLanes);
  const int64_t end = std::min(kPanel, task.limit - row);
  for (int64_t i = 0; i < end; ++i) {
    best.offer(task.query, scores[i], static_cast<uint32_t>(start + row + i));
  }
}

template <int M>
void offer_panel(
    const Problem& p,
    const Task* tasks,
    const std::array<const float*, kQueries>& queries,
    const float* panel,
    const float* bias,
    int64_t start,
    int64_t row,
    Best& best) {
  panel_product<M>(queries, panel, bias, p.d, [&](int m, const Vec& low, const Vec& high) {
    const Vec floor(best.floor(tasks[m].query));
    const Vec above = (low > floor) | (high > floor);
    if (above.zero_mask() != (1 << kLanes) - 1) {
      const std::array<Vec, 2> found{low, high};
      offer_found(found, tasks[m], start, row, best);
    }
  });
}

using OfferPanel = void (*)(
    const Problem&,
    const Task*,
    const std::array<const float*, kQueries>&,
    const float*,
    const float*,
    int64_t,
    int64_t,
    Best&);

template <int... I>
constexpr std::array<OfferPanel, sizeof...(I)> offer_panels(std::integer_sequence<int, I...>) {
  return {offer_panel<I + 1>...};
}

template <typename T>
void scan_panels(const Problem& p, const T* packed, const Visit& visit, int64_t query, Best& best, Scratch& scratch) {
  static constexpr auto kOffer = offer_panels(std::make_integer_sequence<int, kQueries>());
  const int64_t section = std::max<int64_t>(1, kSectionBytes / (4 * p.d * kPanel)) * kPanel;
  float* panels = Scratch::take(scratch.panels, section * p.d);
  float* bias = Scratch::take(scratch.bias, section);
  for (int64_t row = visit.first; row < visit.last; row += section) {
    const int64_t rows = std::min(section, visit.last - row);
    const int64_t at = visit.start + row;
    const float* from = as_float(packed + at * p.d, rows * p.d, Scratch::take(scratch.rows, section * p.d));
    pack_panels(from, rows, p.d, panels);
    for (int64_t i = 0; i < section; ++i) {
      bias[i] = i >= rows ? kNever : p.bias ? p.bias[at + i] : 0.0f;
    }
    for (int64_t t = 0; t < visit.count && visit.tasks[t].limit > row; t += kQueries) {
      const Task* tasks = visit.tasks + t;
      const int64_t group = std::min<int64_t>(kQueries, visit.count - t);
      std::array<const float*, kQueries> queries;
      for (int64_t m = 0; m < group; ++m) {
        queries[m] = p.x + (query + tasks[m].query) * p.d;
      }
      for (int64_t i = 0; i < rows && row + i < tasks->limit; i += kPanel) {
        kOffer[group - 1](p, tasks, queries, panels + i * p.d, bias + i, visit.start, row + i, best);
      }
    }
  }
}

template <int M>
void offer_rows(
    const Problem& p,
    const Task* tasks,
    int64_t query,
    const std::array<const float*, kRows>& rows,
    int64_t start,
    int64_t row,
    int64_t count,
    Best& best) {
  std::array<const float*, kFew> queries;
  for (int m = 0; m < M; ++m) {
    queries[m] = p.x + (query + tasks[m].query) * p.d;
  }
  float scores[kFew][kRows];
  row_product<M>(queries, rows, p.d, scores);
  for (int m = 0; m < M; ++m) {
    const float floor = best.floor(tasks[m].query);
    const int64_t end = std::min(count, tasks[m].limit - row);
    for (int64_t i = 0; i < end; ++i) {
      const float score = scores[m][i] + (p.bias ? p.bias[start + row + i] : 0.0f);
      if (score > floor) {
        best.offer(tasks[m].query, score, static_cast<uint32_t>(start + row + i));
      }
    }
  }
}

template <typename T>
void scan_rows(const Problem& p, const T* packed, const Visit& visit, int64_t query, Best& best, Scratch& scratch) {
  for (int64_t row = visit.first; row < visit.last && row < visit.tasks->limit; row += kRows) {
    const int64_t count = std::min<int64_t>(kRows, visit.last - row);
    // A processor fetches ahead within a page of memory; this reaches into the next one.
    for (int64_t i = 0; i < kRows * p.d; i += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(packed + (visit.start + row + kAhead) * p.d + i);
    }
    const float* from =
        as_float(packed + (visit.start + row) * p.d, count * p.d, Scratch::take(scratch.rows, kRows * p.d));
    std::array<const float*, kRows> rows;
    for (int64_t i = 0; i < kRows; ++i) {
      rows[i] = from + std::min(i, count - 1) * p.d;
    }
    for (int64_t t = 0; t < visit.count && visit.tasks[t].limit > row; t += kFew) {
      const auto offer = visit.count - t >= 3 ? offer_rows<3> : visit.count - t == 2 ? offer_rows<2> : offer_rows<1>;
      offer(p, visit.tasks + t, query, rows, visit.start, row, count, best);
    }
  }
}

// Multiply the tasks with those rows of their lists that lie in [first, last) of the packed rows.
template <typename T>
void scan_tasks(
    const Problem& p,
    const T* packed,
    const Tasks& tasks,
    int64_t first,
    int64_t last,
    Best& best,
    Scratch& scratch) {
  for (int32_t list : tasks.lists) {
    const int64_t start = p.offsets[list];
    const Visit visit{
        tasks.tasks.data() + tasks.starts[list],
        tasks.count(list),
        start,
        std::max<int64_t>(0, first - start),
        std::min(p.sizes[list], last - start)};
    if (visit.first < visit.last) {
      (visit.count < kPackPays ? scan_rows<T> : scan_panels<T>)(p, packed, visit, tasks.first_query, best, scratch);
    }
  }
}

// Where to cut the packed rows so that each share has about as much work.
std::vector<int64_t> cuts_of(const Problem& p, const Tasks& tasks, int64_t shares) {
  std::vector<int32_t> lists(tasks.lists);
  std::sort(lists.begin(), lists.end(), [&](int32_t a, int32_t b) { return p.offsets[a] < p.offsets[b]; });
  double total = 0;
  for (int32_t list : lists) {
    total += static_cast<double>(p.sizes[list]) * tasks.count(list);
  }
  std::vector<int64_t> cuts{0};
  double before = 0;
  for (int32_t list : lists) {
    const double here = static_cast<double>(p.sizes[list]) * tasks.count(list);
    while (static_cast<int64_t>(cuts.size()) < shares && total * cuts.size() / shares <= before + here) {
      const double part = here > 0 ? (total * cuts.size() / shares - before) / here : 0;
      const int64_t row = static_cast<int64_t>(part * p.sizes[list]) / kPanel * kPanel;
      cuts.push_back(std::max(cuts.back(), p.offsets[list] + row));
    }
    before += here;
  }
  cuts.resize(shares, cuts.back());
  cuts.push_back(std::numeric_limits<int64_t>::max());
  return cuts;
}

// Call job(i) for every i below `count`, each on whichever thread is free.
template <typename Job>
void on_threads(int64_t count, const Job& job) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t i = next++; i < count; i = next++) {
        job(i);
      }
    }
  });
}

// Threads share out the queries.
template <typename T>
void scan_by_queries(const Problem& p, const T* packed, int64_t block, float* scores, int64_t* rows) {
  on_threads((p.queries + block - 1) / block, [&](int64_t i) {
    const int64_t query = i * block, last = std::min(p.queries, query + block);
    Best best;
    Scratch scratch;
    best.reset(last - query, p.k);
    // The nearest lists first: their rows raise the floors before the many others come.
    const int64_t nearest = std::min<int64_t>(1, p.probes);
    const int64_t all = std::numeric_limits<int64_t>::max();
    scan_tasks(p, packed, tasks_of(p, query, last, 0, nearest), 0, all, best, scratch);
    scan_tasks(p, packed, tasks_of(p, query, last, nearest, p.probes), 0, all, best, scratch);
    for (int64_t q = query; q < last; ++q) {
      best.write(q - query, scores + q * p.k, rows + q * p.k);
    }
  });
}

// Threads share out the rows, for some queries at a time.
template <typename T>
void scan_by_rows(const Problem& p, const T* packed, int64_t block, float* scores, int64_t* rows) {
  const int64_t shares = at::get_num_threads();
  for (int64_t query = 0; query < p.queries; query += block) {
    const int64_t last = std::min(p.queries, query + block);
    const Tasks tasks = tasks_of(p, query, last, 0, p.probes);
    const std::vector<int64_t> cuts = cuts_of(p, tasks, shares);
    std::vector<Best> bests(shares);
    on_threads(shares, [&](int64_t share) {
      Scratch scratch;
      bests[share].reset(last - query, p.k);
      scan_tasks(p, packed, tasks, cuts[share], cuts[share + 1], bests[share], scratch);
    });
    at::parallel_for(query, last, 64, [&](int64_t first, int64_t end) {
      for (int64_t q = first; q < end; ++q) {
        for (int64_t share = 1; share < shares; ++share) {
          bests[0].take(q - query, bests[share]);
        }
        bests[0].write(q - query, scores + q * p.k, rows + q * p.k);
      }
    });
  }
}

template <typename T>
void scan_all(const Problem& p, const T* packed, int64_t max_bytes, float* scores, int64_t* rows) {
  const int64_t threads = at::get_num_threads();
  const int64_t tasks = p.queries * p.probes / std::max<int64_t>(1, p.lists); // of a list
  const int64_t held = std::max<int64_t>(1, max_bytes / (8 * Best::room(p.k) * threads + 24 * p.probes + 16));
  if (threads > 1 && tasks < kShareQueries * threads) {
    return scan_by_rows(p, packed, std::min(held, p.queries), scores, rows);
  }
  const int64_t rounds = std::clamp<int64_t>(tasks / (kBlockTasks * threads), 1, 4);
  const int64_t even = (p.queries + threads * rounds - 1) / (threads * rounds);
  scan_by_queries(p, packed, std::min(held, even), scores, rows);
}

void check(const at::Tensor& tensor, const char* name, int64_t dim, at::ScalarType dtype) {
  TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got ", tensor.dim());
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

template <typename Call>
void with_rows(const at::Tensor& packed, const Call& call) {
  switch (packed.scalar_type()) {
    case at::kFloat:
      return call(packed.const_data_ptr<float>());
    case at::kHalf:
      return call(packed.const_data_ptr<at::Half>());
    case at::kBFloat16:
      return call(packed.const_data_ptr<at::BFloat16>());
    default:
      TORCH_CHECK(false, "packed must be float32, float16 or bfloat16, got ", packed.scalar_type());
  }
}

std::tuple<at::Tensor, at::Tensor> scan(
    const at::Tensor& x,
    const at::Tensor& packed,
    const at::Tensor& bias,
    const at::Tensor& offsets,
    const at::Tensor& sizes,
    const at::Tensor& probed,
    const std::optional<at::Tensor>& limits,
    int64_t k,
    int64_t max_bytes) {
  check(x, "x", 2, at::kFloat);
  check(packed, "packed", 2, packed.scalar_type());
  check(bias, "bias", 1, at::kFloat);
  check(offsets, "offsets", 1, at::kLong);
  check(sizes, "sizes", 1, at::kLong);
  check(probed, "probed", 2, at::kLong);
  TORCH_CHECK(x.size(1) == packed.size(1), "x has ", x.size(1), " columns, packed has ", packed.size(1));
  TORCH_CHECK(bias.size(0) == 0 || bias.size(0) == packed.size(0), "bias must be empty or of one entry a row");
  TORCH_CHECK(sizes.size(0) == offsets.size(0) && sizes.size(0) > 0, "offsets and sizes must be of equal length");
  TORCH_CHECK(probed.size(0) == x.size(0), "probed must have a row for each query");
  TORCH_CHECK(packed.size(0) < (int64_t(1) << 31), "packed must have less than 2^31 rows, got ", packed.size(0));
  TORCH_CHECK(k > 0, "k must be >= 1, got ", k);
  if (limits) {
    check(*limits, "limits", 2, at::kLong);
    TORCH_CHECK(limits->sizes() == probed.sizes(), "limits must have the shape of probed");
  }
  const Problem p{
      x.const_data_ptr<float>(),
      bias.size(0) ? bias.const_data_ptr<float>() : nullptr,
      offsets.const_data_ptr<int64_t>(),
      sizes.const_data_ptr<int64_t>(),
      probed.const_data_ptr<int64_t>(),
      limits ? limits->const_data_ptr<int64_t>() : nullptr,
      x.size(0),
      sizes.size(0) - 1,
      probed.size(1),
      x.size(1),
      k};
  at::Tensor scores = at::empty({p.queries, k}, x.options());
  at::Tensor rows = at::empty({p.queries, k}, probed.options());
  with_rows(packed, [&](const auto* from) {
    scan_all(p, from, max_bytes, scores.mutable_data_ptr<float>(), rows.mutable_data_ptr<int64_t>());
  });
  return {scores, rows};
}

// The score of one row that users see: of differences, or of products.
template <bool Differences>
float exact_score(const float* x, const float* row, int64_t d) {
  Vec sums[2] = {Vec(0.0f), Vec(0.0f)};
  int64_t i = 0;
  const auto add = [&](Vec& sum) {
    const Vec query = Vec::loadu(x + i), value = Vec::loadu(row + i);
    if constexpr (Differences) {
      const Vec apart = query - value;
      sum = at::vec::fmadd(apart, apart, sum);
    } else {
      sum = at::vec::fmadd(query, value, sum);
    }
    i += kLanes;
  };
  while (i + 2 * kLanes <= d) {
    add(sums[0]);
    add(sums[1]);
  }
  if (i + kLanes <= d) {
    add(sums[0]);
  }
  float sum = sum_of(sums[0] + sums[1]);
  for (; i < d; ++i) {
    sum += Differences ? (x[i] - row[i]) * (x[i] - row[i]) : x[i] * row[i];
  }
  return Differences ? -sum : sum;
}

at::Tensor exact_scores(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& rows, bool differences) {
  check(x, "x", 2, at::kFloat);
  check(packed, "packed", 2, packed.scalar_type());
  check(rows, "rows", 2, at::kLong);
  TORCH_CHECK(x.size(1) == packed.size(1), "x has ", x.size(1), " columns, packed has ", packed.size(1));
  TORCH_CHECK(rows.size(0) == x.size(0), "rows must have a row for each query");
  const int64_t d = x.size(1), count = rows.size(1);
  at::Tensor scores = at::empty(rows.sizes(), x.options());
  const float* queries = x.const_data_ptr<float>();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  float* out = scores.mutable_data_ptr<float>();
  with_rows(packed, [&](const auto* from) {
    constexpr int64_t kLine = 64 / sizeof(*from);
    at::parallel_for(0, x.size(0), 16, [&](int64_t first, int64_t last) {
      std::vector<float> scratch(d);
      for (int64_t i = first * count; i < last * count; ++i) {
        // The rows lie anywhere: ask for the second next one while this one is looked at.
        if (i + 2 < last * count && row[i + 2] >= 0) {
          for (int64_t j = 0; j < d; j += kLine) {
            __builtin_prefetch(from + row[i + 2] * d + j);
          }
        }
        if (row[i] < 0) {
          out[i] = kNever;
          continue;
        }
        const float* query = queries + i / count * d;
        const float* vector = as_float(from + row[i] * d, d, scratch.data());
        out[i] = differences ? exact_score<true>(query, vector, d) : exact_score<false>(query, vector, d);
      }
    });
  });
  return scores;
}

TORCH_LIBRARY(torch_ivf_module, library) {
  library.def(
      "scan(Tensor x, Tensor packed, Tensor bias, Tensor offsets, Tensor sizes, Tensor probed, Tensor? limits, "
      "int k, int max_bytes) -> (Tensor, Tensor)");
  library.def("exact_scores(Tensor x, Tensor packed, Tensor rows, bool differences) -> Tensor");
}

TORCH_LIBRARY_IMPL(torch_ivf_module, CPU, library) {
  library.impl("scan", &scan);
  library.impl("exact_scores", &exact_scores);
}

} // namespace
} // namespace torch_ivf_module
