// The core by itself, to be run under ThreadSanitizer and AddressSanitizer: several threads search the same lists at the
// same time, each with the help of the pool. Prints nothing and returns 0, or says what is wrong and returns 1.
//
// Q queries, L lists, N vectors, d dim, k results.

#include "core.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

namespace torch_ivf_module {
extern const Core core_baseline;
extern const CodesCore codes_core_baseline;
}

using namespace torch_ivf_module;

namespace {

constexpr int64_t kVectors = 40000, kPending = 300, kLists = 20, kDim = 17, kQueries = 300, kResults = 7;

void expect(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "not so: %s\n", what);
    std::exit(1);
  }
}

std::vector<float> normal(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> out(count);
  std::generate(out.begin(), out.end(), [&] { return distribution(generator); });
  return out;
}

constexpr float kOrigin = 0.25f; // in each dimension

std::vector<float> bias_of(const std::vector<float>& rows) {
  std::vector<float> bias(rows.size() / kDim);
  for (size_t i = 0; i < rows.size(); ++i) {
    bias[i / kDim] -= (rows[i] - kOrigin) * (rows[i] - kOrigin) / 2;
  }
  return bias;
}

// Lists of uneven sizes, end to end.
struct Lists {
  std::vector<float> rows, bias;
  std::vector<int64_t> offsets, sizes, ids;

  Lists(int64_t count, unsigned seed, int64_t first_id)
      : rows(normal(count * kDim, seed)), bias(bias_of(rows)), offsets(kLists + 1), sizes(kLists + 1), ids(count) {
    for (int64_t l = 0; l <= kLists; ++l) {
      offsets[l] = count * l * l / (kLists * kLists);
      sizes[std::max<int64_t>(0, l - 1)] = offsets[l] - offsets[std::max<int64_t>(0, l - 1)];
    }
    for (int64_t i = 0; i < count; ++i) {
      ids[i] = first_id + i;
    }
  }

  Segment segment(bool differences) const {
    return {rows.data(), differences ? bias.data() : nullptr, offsets.data(), sizes.data(), ids.data(), static_cast<int64_t>(ids.size())};
  }
};

// Codes of lists, made by several threads.
struct Encoded {
  std::vector<float> centres, norms, limits;
  std::vector<uint8_t> panels;
  std::vector<int64_t> first;

  explicit Encoded(const Lists& lists) : centres(kLists * kDim), limits(3 * kLists), first(kLists + 1) {
    for (int64_t l = 0; l < kLists; ++l) {
      first[l + 1] = first[l] + (lists.sizes[l] + kCodedRows - 1) / kCodedRows;
    }
    norms.resize(2 * first[kLists]);
    panels.resize(first[kLists] * panel_bytes(kDim));
    codes_core_baseline.encode(
        lists.segment(false), Dtype::kFloat32, kLists, kDim, 3,
        {centres.data(), panels.data(), first.data(), norms.data(), limits.data()});
  }

  Codes codes() const {
    return {centres.data(), panels.data(), first.data(), norms.data(), limits.data()};
  }
};

struct Data {
  Lists packed{kVectors, 1, 0}, pending{kPending, 2, kVectors};
  std::vector<float> centroids = normal(kLists * kDim, 3), centroid_bias = bias_of(centroids);
  Encoded encoded{packed};
  std::vector<float> queries = normal(kQueries * kDim, 4), origin = std::vector<float>(kDim, kOrigin);
};

struct Found {
  std::vector<float> scores = std::vector<float>(kQueries * kResults);
  std::vector<int64_t> rows = std::vector<int64_t>(kQueries * kResults), ids = rows;
  std::unique_ptr<bool[]> again{new bool[kQueries]};
  std::vector<int64_t> scored = std::vector<int64_t>(kQueries);
};

Found search(
    const Data& data, int64_t queries, int64_t nprobe, int64_t threads, int64_t max_bytes, bool differences, bool coded) {
  const Codes codes = data.encoded.codes();
  Request request{};
  Problem& p = request.problem;
  p.x = data.queries.data();
  p.segments = {data.packed.segment(differences), data.pending.segment(differences)};
  p.segment_count = 2;
  p.dtype = Dtype::kFloat32;
  p.row_bytes = kDim * sizeof(float);
  p.queries = queries;
  p.lists = kLists;
  p.d = kDim;
  p.k = kResults;
  p.within = {threads, max_bytes};
  request.coarse = {
      data.centroids.data(), differences ? data.centroid_bias.data() : nullptr, data.origin.data(), kLists, {}, nullptr};
  request.nprobe = nprobe;
  request.kept = kResults + 3;
  request.differences = differences;
  request.codes = coded ? &codes : nullptr;
  request.search_codes = codes_core_baseline.search;
  Found found;
  core_baseline.search(request, {{found.scores.data(), found.rows.data()}, found.ids.data(), found.again.get(), found.scored.data()});
  return found;
}

double score(const float* x, const float* row, bool differences) {
  double sum = 0;
  for (int64_t i = 0; i < kDim; ++i) {
    const double apart = static_cast<double>(x[i]) - row[i];
    sum += differences ? -apart * apart : static_cast<double>(x[i]) * row[i];
  }
  return sum;
}

// All rows, whatever their list, for a search that probes every list.
void agrees_with_all_rows(const Data& data, const Found& found, bool differences) {
  for (int64_t q = 0; q < kQueries; q += 11) {
    std::vector<double> scores;
    for (const Lists* lists : {&data.packed, &data.pending}) {
      for (size_t i = 0; i < lists->ids.size(); ++i) {
        scores.push_back(score(&data.queries[q * kDim], &lists->rows[i * kDim], differences));
      }
    }
    for (int64_t i = 0; i < kResults; ++i) {
      const int64_t id = found.ids[q * kResults + i];
      expect(id >= 0 && id == found.rows[q * kResults + i], "rows count on from one segment to the next");
      const int64_t better = std::count_if(scores.begin(), scores.end(), [&](double s) { return s > scores[id]; });
      expect(better == i, "each result is the next best of all rows");
      expect(std::fabs(scores[id] - found.scores[q * kResults + i]) < 1e-4, "scores are exact");
    }
  }
}

void same(const Found& one, const Found& other, int64_t queries) {
  const int64_t count = queries * kResults;
  expect(std::equal(one.ids.begin(), one.ids.begin() + count, other.ids.begin()), "ids do not depend on threads");
}

} // namespace

int main() {
  Data data;
  for (int kind = 0; kind < 4; ++kind) {
    const bool differences = kind % 2 == 0, coded = kind >= 2;
    agrees_with_all_rows(data, search(data, kQueries, kLists, 3, 1 << 28, differences, coded), differences);
    const Found alone = search(data, kQueries, 5, 1, 1 << 28, differences, !coded);
    same(alone, search(data, 1, 5, 4, 1 << 28, differences, coded), 1);
    std::vector<std::thread> callers;
    for (int64_t caller = 0; caller < 4; ++caller) {
      callers.emplace_back([&, caller] {
        for (int64_t max_bytes : {int64_t{1} << 28, int64_t{1} << 20, int64_t{1} << 12}) {
          same(alone, search(data, kQueries, 5, 1 + caller, max_bytes, differences, coded), kQueries);
        }
      });
    }
    callers.emplace_back([&] {
      expect(Encoded{data.packed}.panels == data.encoded.panels, "codes are made of lists while others search them");
    });
    for (std::thread& caller : callers) {
      caller.join();
    }
  }
  data.queries[3] = std::numeric_limits<float>::quiet_NaN();
  const Found found = search(data, kQueries, 5, 3, 1 << 28, true, true);
  expect(std::count(found.ids.begin(), found.ids.begin() + kResults, -1) == kResults, "NaN finds nothing");
  expect(found.ids[kResults] >= 0 && !found.again[0], "other queries are not touched");
  return 0;
}
