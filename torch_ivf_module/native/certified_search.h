// The k best rows of the probed lists by exact score, whatever the scan rounds.
//
// Q queries, d dim, k results, K candidates a query.
#pragma once

#include "certify.h"
#include "scan.h"
#include "scan_float.h"
#include "select.h"

namespace torch_ivf_module {

// Estimates for one core: nanoseconds until a row that lies anywhere in memory has come, and to prepare a place of a query.
constexpr double kRowNanoseconds = 60;
constexpr double kPrepareNanoseconds = 1.5;

template <typename T>
class CertifiedSearch {
 public:
  // `p` is complete but for its x and k; queries x (Q, d) must be finite. `kept` candidates a query are scored exactly.
  CertifiedSearch(
      const Problem& p, const float* x, const float* origin, bool differences, int64_t k, int64_t kept, Best out,
      bool* again)
      : p_(p),
        x_(x),
        origin_(origin),
        differences_(differences),
        k_(k),
        out_(out),
        again_(again),
        buffers_(p.within.threads) {
    p_.x = x;
    p_.k = kept;
  }

  void run() {
    if (differences_) {
      shift();
    }
    const Distances distances{x_, highest_.data(), origin_, with_origin_.data()};
    if (p_.lists == 1 && p_.segment_count == 1 && p_.segments[0].rows <= AllScores::kMostRows) {
      const int64_t rows = p_.segments[0].rows;
      first_pass(distances, AllScores::bytes(rows), [&](int64_t, int64_t count, Thresholds&) {
        return AllScores(count, rows, p_.k);
      });
    } else {
      first_pass(distances, TopK::bytes(p_.k), [&](int64_t, int64_t count, Thresholds& thresholds) {
        return TopK(count, p_.k, thresholds);
      });
    }
    second_pass();
  }

 private:
  struct Buffers {
    std::vector<float> row;
    std::vector<uint64_t> keys, found;
  };

  template <typename MakeFound>
  void first_pass(const Distances& distances, int64_t bytes, const MakeFound& make) {
    scan_all(
        p_, bytes, [&] { return FloatScanner<T>(p_, differences_ ? &distances : nullptr); }, make,
        p_.k * (kRowNanoseconds + p_.d / kWorkPerNanosecond),
        [&](int64_t query, auto* found, int64_t number, int64_t member) {
          Buffers& buffers = buffers_[member];
          finish(query, found ? found->best(number, buffers.found) : TopK::Best{nullptr, 0, kNever, 0}, buffers);
        });
  }

  // Queries relative to the origin, and what is known of them.
  void shift() {
    shifted_.resize(p_.queries * p_.d);
    norms_.resize(p_.queries);
    with_origin_.resize(p_.queries);
    highest_.resize(p_.queries);
    const double origin_norm = norm(origin_, p_.d);
    const int64_t team = team_for(kPrepareNanoseconds * p_.queries * p_.d, p_.within.threads);
    parallel_items((p_.queries + kFinishQueries - 1) / kFinishQueries, team, [&](int64_t item, int64_t) {
      for (int64_t q = item * kFinishQueries; q < std::min(p_.queries, (item + 1) * kFinishQueries); ++q) {
        float* y = shifted_.data() + q * p_.d;
        for (int64_t i = 0; i < p_.d; ++i) {
          y[i] = x_[q * p_.d + i] - origin_[i];
        }
        norms_[q] = QueryNorms(y, origin_, origin_norm, p_.d);
        with_origin_[q] = static_cast<float>(norms_[q].offset);
        highest_[q] = static_cast<float>(norms_[q].size * norms_[q].size / 2);
      }
    });
    p_.x = shifted_.data();
  }

  // Score the candidates of a query exactly, and see whether they prove the answer.
  void finish(int64_t query, const TopK::Best& found, Buffers& buffers) {
    rescore(query, found, buffers);
    const bool left_out = found.others > kNever;
    if (differences_) {
      const QueryNorms& norms = norms_[query];
      const float kth = out_.scores[(query + 1) * k_ - 1];
      const bool reached = left_out && found.others >= needed_ranking(norms, kth, p_.d, true, found.roundings);
      again_[query] = reached || overflows(norms.size, norms.origin_norm);
    } else {
      again_[query] = left_out && std::isinf(found.others);
    }
  }

  void rescore(int64_t query, const TopK::Best& found, Buffers& buffers) {
    const float* x = x_ + query * p_.d;
    float* row = take(buffers.row, p_.d);
    std::vector<uint64_t>& keys = buffers.keys;
    keys.clear();
    for (int64_t i = 0; i < found.count; ++i) {
      // The rows lie anywhere: request the second next one while this one is scored.
      for (int64_t j = 0; i + 2 < found.count && j < p_.row_bytes; j += 64) {
        __builtin_prefetch(p_.row<char>(row_of(found.keys[i + 2])) + j);
      }
      const uint32_t number = row_of(found.keys[i]);
      const float score = exact_score(differences_, x, as_float(p_.row<T>(number), 1, p_.d, row), p_.d);
      if (std::isfinite(score)) {
        keys.push_back(as_key(score, number));
      }
    }
    const int64_t best = std::min<int64_t>(k_, keys.size());
    std::partial_sort(keys.begin(), keys.begin() + best, keys.end(), std::greater<>());
    for (int64_t i = 0; i < k_; ++i) {
      out_.scores[query * k_ + i] = i < best ? score_of(keys[i]) : kNever;
      out_.rows[query * k_ + i] = i < best ? static_cast<int64_t>(row_of(keys[i])) : -1;
    }
  }

  // One more pass for queries whose candidates prove nothing.
  void second_pass() {
    std::vector<int64_t> bounded, unbounded;
    std::vector<float> needed(differences_ ? p_.queries : 0);
    for (int64_t q = 0; differences_ && q < p_.queries; ++q) {
      if (again_[q]) {
        // Panels of the second pass hold vectors as they are, for exact scores.
        const float kth = out_.scores[(q + 1) * k_ - 1];
        needed[q] = needed_ranking(norms_[q], kth, p_.d, false, kByDifferences | kAlongRows | kByPanels);
        (needed[q] == kNever ? unbounded : bounded).push_back(q);
      }
    }
    if (!bounded.empty()) {
      scan_again(bounded, needed);
    }
    p_.k = k_;
    const double work = (kRowNanoseconds + p_.d / kWorkPerNanosecond) * p_.segments[0].rows * unbounded.size();
    parallel_items(unbounded.size(), team_for(work, p_.within.threads), [&](int64_t i, int64_t) {
      const int64_t q = unbounded[i];
      Thresholds thresholds(1);
      ExactTopK<T> best(1, p_, x_ + q * p_.d, &needed[q], differences_, thresholds);
      score_every_row(p_, q, best);
      best.write(0, out_.scores + q * k_, out_.rows + q * k_);
    });
  }

  // Score exactly every row of those queries whose ranking score reaches what is needed.
  void scan_again(const std::vector<int64_t>& queries, const std::vector<float>& needed) {
    Subset some(p_, x_, queries, needed);
    some.problem.k = k_;
    std::vector<float> highest;
    for (int64_t q : queries) {
      highest.push_back(static_cast<float>(norms_[q].size * norms_[q].size / 2 + norms_[q].offset));
    }
    const Distances distances{some.plain.data(), highest.data(), nullptr, nullptr};
    scan_all(
        some.problem, TopK::bytes(k_), [&] { return FloatScanner<T>(some.problem, &distances); },
        [&](int64_t first, int64_t count, Thresholds& thresholds) {
          const float* x = some.plain.data() + first * p_.d;
          return ExactTopK<T>(count, some.problem, x, &some.thresholds[first], differences_, thresholds);
        },
        kRowNanoseconds,
        [&](int64_t i, ExactTopK<T>* found, int64_t number, int64_t) {
          if (found) {
            found->write(number, out_.scores + queries[i] * k_, out_.rows + queries[i] * k_);
          }
        });
  }

  Problem p_;
  const float* x_;
  const float* origin_;
  bool differences_;
  int64_t k_;
  Best out_;
  bool* again_; // see Answer
  std::vector<float> shifted_;
  std::vector<float> with_origin_, highest_; // (Q,) see Distances
  std::vector<QueryNorms> norms_;
  std::vector<Buffers> buffers_; // of each thread
};

} // namespace torch_ivf_module
