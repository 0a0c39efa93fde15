// Codes of the rows of inverted lists.
//
// L lists, N vectors, d dim, P panels.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>

#include "codes.h"
#include "rows.h"
#include "threads.h"

namespace torch_ivf_module {

template <typename T>
class ListEncoder {
 public:
  ListEncoder(const Segment& lists, int64_t d, const EncodedLists& out) : lists_(lists), d_(d), out_(out), row_(d) {}

  // The mean of rows of a list, without those far from most: of at most kSample rows, evenly spaced.
  void find_centre(int64_t list) {
    constexpr int64_t kSample = 4096, kMiddle = 15;
    const int64_t rows = lists_.sizes[list], count = std::min(rows, kSample);
    float* centre = out_.centres + list * d_;
    std::fill_n(centre, d_, 0.0f);
    if (rows == 0) {
      return;
    }
    const auto at = [&](int64_t i, int64_t of) { return vector(list, i * rows / of); };
    std::vector<float> middle(d_), columns(std::min(rows, kMiddle) * d_), far(count);
    const int64_t few = std::min(rows, kMiddle);
    for (int64_t i = 0; i < few; ++i) {
      const float* from = at(i, few);
      for (int64_t j = 0; j < d_; ++j) {
        columns[j * few + i] = from[j];
      }
    }
    for (int64_t j = 0; j < d_; ++j) {
      std::nth_element(&columns[j * few], &columns[j * few + few / 2], &columns[j * few] + few);
      middle[j] = columns[j * few + few / 2];
    }
    for (int64_t i = 0; i < count; ++i) {
      far[i] = -exact_score<true>(middle.data(), at(i, count), d_);
    }
    std::vector<float> sorted(far);
    std::nth_element(sorted.begin(), sorted.begin() + count / 2, sorted.end());
    const float most = 4 * sorted[count / 2];
    int64_t near = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (far[i] <= most) {
        const float* from = at(i, count);
        ++near;
        for (int64_t j = 0; j < d_; ++j) {
          centre[j] += (from[j] - centre[j]) / static_cast<float>(near);
        }
      }
    }
  }

  // The rows [first, last) of a list, which are a run, sorted by the norm of their residuals. Returns kappa and the median
  // of the norms; kappa is NaN where a row cannot be coded.
  std::pair<float, float> encode_run(int64_t list, int64_t first, int64_t last) {
    const float* centre = out_.centres + list * d_;
    std::vector<float> values(d_ + kLanes);
    std::vector<int8_t> codes(d_ + kLanes);
    std::vector<std::pair<float, uint16_t>> order(last - first);
    for (int64_t i = first; i < last; ++i) {
      const float norm = std::sqrt(-exact_score<true>(centre, vector(list, i), d_));
      order[i - first] = {norm == norm ? norm : kLargestNorm, static_cast<uint16_t>(i - first)};
    }
    std::sort(order.begin(), order.end());
    float kappa = 0;
    int64_t panel = out_.first[list] + first / kCodedRows;
    for (size_t begin = 0; begin < order.size(); begin += kCodedRows, ++panel) {
      uint8_t* bytes = out_.panels + panel * panel_bytes(d_);
      std::fill_n(bytes, panel_bytes(d_), uint8_t{0});
      float lowest = std::numeric_limits<float>::infinity(), highest = 0;
      for (int64_t i = 0; i < kCodedRows; ++i) {
        const size_t at = begin + i;
        if (at >= order.size()) {
          write(bytes, i, std::numeric_limits<float>::quiet_NaN(), 0, 0);
          continue;
        }
        const Residual r = residual(vector(list, first + order[at].second), centre, d_, values.data());
        const float scale = scale_of(r.most, 127), norm = norm_of(r.squares, d_);
        const Quantised lost = quantise(values.data(), d_, scale, 1 / scale, codes.data());
        write(bytes, i, scale, half_square(norm), order[at].second);
        write_codes(bytes, i, codes.data());
        lowest = std::min(lowest, norm * (1 - 4 * sum_rounding(d_)));
        highest = std::max(highest, norm);
        if (!(norm < kLargestNorm)) {
          return {std::numeric_limits<float>::quiet_NaN(), 0};
        }
        kappa = std::max(kappa, error_of(lost.squares, norm, scale, d_) / scale * (1 + 4 * kUnit));
      }
      out_.norms[2 * panel] = lowest;
      out_.norms[2 * panel + 1] = highest;
    }
    return {kappa, order[order.size() / 2].first};
  }

 private:
  static float half_square(float norm) {
    return norm * norm * 0.5f * (1 + 4 * kUnit);
  }

  static void write(uint8_t* panel, int64_t i, float scale, float half, uint16_t row) {
    std::memcpy(panel + 4 * i, &scale, 4);
    std::memcpy(panel + 4 * (kCodedRows + i), &half, 4);
    std::memcpy(panel + 8 * kCodedRows + 2 * i, &row, 2);
  }

  void write_codes(uint8_t* panel, int64_t i, const int8_t* codes) {
    for (int64_t group = 0; group < Panel::groups(d_); ++group) {
      uint32_t four;
      std::memcpy(&four, codes + 4 * group, 4);
      four ^= 0x80808080u; // + 128
      std::memcpy(panel + Panel::kHead + group * Panel::kGroup + 4 * i, &four, 4);
    }
  }

  const float* vector(int64_t list, int64_t row) {
    return as_float(row_at<T>(lists_.packed, lists_.offsets[list] + row, d_), 1, d_, row_.data());
  }

  const Segment& lists_;
  int64_t d_;
  EncodedLists out_;
  std::vector<float> row_;
};

template <typename T>
void encode_lists(const Segment& lists, int64_t count, int64_t d, int64_t threads, const EncodedLists& out) {
  constexpr double kNanoseconds = 2; // an estimate, of a number
  struct Run {
    int64_t list, first;
    float kappa, middle;
  };
  std::vector<Run> runs;
  for (int64_t list = 0; list < count; ++list) {
    for (int64_t first = 0; first < lists.sizes[list]; first += kRun) {
      runs.push_back({list, first, 0, 0});
    }
  }
  const int64_t team = team_for(kNanoseconds * static_cast<double>(lists.rows * d), threads);
  // The centre of a list that is one run is found just before that is encoded: rows in a file are then read once.
  const auto one_run = [&](int64_t list) { return lists.sizes[list] > 0 && lists.sizes[list] <= kRun; };
  parallel_items(count, team, [&](int64_t list, int64_t) {
    if (!one_run(list)) {
      ListEncoder<T>(lists, d, out).find_centre(list);
    }
  });
  parallel_items(runs.size(), team, [&](int64_t i, int64_t) {
    Run& run = runs[i];
    ListEncoder<T> encoder(lists, d, out);
    if (one_run(run.list)) {
      encoder.find_centre(run.list);
    }
    const int64_t last = std::min(lists.sizes[run.list], run.first + kRun);
    std::tie(run.kappa, run.middle) = encoder.encode_run(run.list, run.first, last);
  });
  const std::vector<float> zero(d);
  for (int64_t list = 0; list < count; ++list) {
    float* limits = out.limits + 3 * list;
    limits[0] = 0;
    limits[1] = kSmallestNorm;
    limits[2] = std::sqrt(-exact_score<true>(zero.data(), out.centres + list * d, d)) * (1 + 4 * sum_rounding(d));
  }
  for (const Run& run : runs) {
    float* limits = out.limits + 3 * run.list;
    limits[0] = limits[0] >= run.kappa ? limits[0] : std::isnan(limits[0]) ? limits[0] : run.kappa;
    limits[1] = std::max(limits[1], run.middle);
  }
}

} // namespace torch_ivf_module
