// A whole search: probe, scan, certify, exact scores, selection, ids.
//
// Q queries, L lists, P probes, d dim, k results.
#pragma once

#include <cmath>

#include "probe.h"

namespace torch_ivf_module {

// Bytes of memory that a query needs in addition to the scan, for each dimension and for each probe.
constexpr int64_t kBytesADimension = 12, kBytesAProbe = 12;

// Whether all values of each query are finite, (Q,). 0 * inf and 0 * NaN are NaN.
inline std::vector<uint8_t> finite_queries(const float* x, int64_t queries, int64_t d) {
  std::vector<uint8_t> finite(queries);
  for (int64_t q = 0; q < queries; ++q) {
    float sum = 0;
    for (int64_t i = 0; i < d; ++i) {
      sum += x[q * d + i] * 0.0f;
    }
    finite[q] = sum == 0.0f;
  }
  return finite;
}

// Words of bits for the listed ids of a query.
inline int64_t mark_words(const Problem& p) {
  return (p.listed_ids + 63) / 64;
}

// Some queries of a request, as many as fit into memory.
template <typename T>
class SearchPart {
 public:
  SearchPart(const Request& request, int64_t first, int64_t queries)
      : request_(request),
        p_(request.problem),
        x_(request.problem.x + first * p_.d),
        first_(first),
        finite_(finite_queries(x_, queries, p_.d)) {
    p_.queries = queries;
    p_.filters = p_.filters ? p_.filters + first : nullptr;
    if (p_.listed_ids) {
      mark_listed();
    }
    if (std::count(finite_.begin(), finite_.end(), 0)) {
      replace_bad_queries();
    }
  }

  void run(const Answer& answer) {
    choose_lists();
    const int64_t at = first_ * p_.k;
    const Best best{answer.best.scores + at, answer.best.rows + at};
    if (p_.filters && few_pass(p_)) {
      score_passing_rows<T>(p_, x_, request_.differences, best, answer.scored + first_);
      std::fill_n(answer.again + first_, p_.queries, false);
    } else if (request_.codes) {
      request_.search_codes(p_, x_, *request_.codes, request_.differences, best, answer.scored + first_);
      std::fill_n(answer.again + first_, p_.queries, false);
    } else if (request_.search_coded_rows) {
      const float* origin = request_.differences ? request_.coarse.origin : nullptr;
      request_.search_coded_rows(p_, x_, origin, best, answer.scored + first_);
      std::fill_n(answer.again + first_, p_.queries, false);
    } else {
      CertifiedSearch<T>(
          p_, x_, request_.coarse.origin, request_.differences, p_.k, request_.kept, best, answer.again + first_)
          .run();
      std::fill_n(answer.scored + first_, p_.queries, int64_t{0});
    }
    for (int64_t i = 0; i < p_.queries * p_.k; ++i) {
      answer.ids[at + i] = id_of(best.rows[i]);
    }
  }

 private:
  // Lists of allowed ids as bits, which are faster to ask.
  void mark_listed() {
    const int64_t words = mark_words(p_);
    filters_.assign(p_.filters, p_.filters + p_.queries);
    marks_.resize(p_.queries * words);
    int64_t listed = 0;
    for (const Filter& filter : filters_) {
      listed += filter.allowed.last - filter.allowed.first;
    }
    const int64_t team = team_for(static_cast<double>(listed), p_.within.threads); // about a nanosecond an id
    parallel_items(p_.queries, team, [&](int64_t q, int64_t) {
      Filter& filter = filters_[q];
      uint64_t* bits = marks_.data() + q * words;
      for (const int64_t* id = filter.allowed.first; id != filter.allowed.last; ++id) {
        bits[*id >> 6] |= uint64_t{1} << (*id & 63);
      }
      filter.bits = bits;
      filter.ids = p_.listed_ids;
      filter.listed = false;
    });
    p_.filters = filters_.data();
  }

  void replace_bad_queries() {
    cleaned_.assign(x_, x_ + p_.queries * p_.d);
    for (int64_t q = 0; q < p_.queries; ++q) {
      if (!finite_[q]) {
        std::fill_n(cleaned_.begin() + q * p_.d, p_.d, 0.0f);
      }
    }
    x_ = cleaned_.data();
  }

  void choose_lists() {
    const bool given = request_.nprobe == 0;
    if (given && cleaned_.empty()) {
      p_.probed = request_.problem.probed + first_ * p_.probes;
    } else {
      p_.probes = given ? p_.probes : request_.nprobe;
      probed_.resize(p_.queries * p_.probes);
      if (given) {
        std::copy_n(request_.problem.probed + first_ * p_.probes, probed_.size(), probed_.begin());
      } else {
        std::vector<float> scores(probed_.size());
        nearest_lists(
            request_.coarse, x_, p_.queries, p_.d, p_.probes, request_.differences, p_.within,
            {scores.data(), probed_.data()});
      }
      p_.probed = probed_.data();
      leave_out(given);
    }
    p_.limits = p_.limits ? p_.limits + first_ * p_.probes : nullptr;
  }

  // Remove the lists of queries that are not finite, and the lists beyond the cap on rows.
  void leave_out(bool given) {
    for (int64_t q = 0; q < p_.queries; ++q) {
      int64_t* lists = probed_.data() + q * p_.probes;
      if (!finite_[q]) {
        std::fill_n(lists, p_.probes, p_.lists);
      } else if (!given && request_.max_codes) {
        cap_rows(p_, request_.max_codes, lists);
      }
    }
  }

  int64_t id_of(int64_t row) const {
    if (row < 0) {
      return -1;
    }
    const int64_t first = p_.segments[0].rows;
    return row < first ? p_.segments[0].ids[row] : p_.segments[1].ids[row - first];
  }

  const Request& request_;
  Problem p_;
  const float* x_;
  int64_t first_;
  std::vector<uint8_t> finite_;
  std::vector<float> cleaned_;
  std::vector<int64_t> probed_;
  std::vector<Filter> filters_;
  std::vector<uint64_t> marks_;
};

// The k best rows of the lists that each query reads.
template <typename T>
void search(const Request& request, const Answer& answer) {
  const Problem& p = request.problem;
  const int64_t probes = request.nprobe ? request.nprobe : p.probes;
  const int64_t marks = p.listed_ids ? 8 * mark_words(p) + static_cast<int64_t>(sizeof(Filter)) : 0;
  const int64_t bytes = kBytesADimension * p.d + kBytesAProbe * probes + marks;
  const int64_t step = std::max<int64_t>(1, p.within.max_bytes / 4 / bytes);
  Request part = request;
  part.problem.within.max_bytes -= p.within.max_bytes / 4;
  for (int64_t first = 0; first < p.queries; first += step) {
    SearchPart<T>(part, first, std::min(step, p.queries - first)).run(answer);
  }
}

} // namespace torch_ivf_module
