// The scan with vectors rounded to bfloat16: for each row an upper bound of its exact score, and the k rows with the
// highest bounds. If the lowest of these bounds is below the k-th exact score, no other row can be among the results.
//
// Rows, and for l2 queries, are rounded as differences from the mean of some rows of a list. The smaller the list, the
// shorter these differences and the smaller the rounding errors. docs/native.md has the proof.
#pragma once

#include "microkernels.h"
#include "codec.h"

namespace torch_ivf_module {

// Bytes of rounded rows at a time. Every query is rounded anew for each of these sections, so they are long.
constexpr int64_t kRoundedBytes = 256 << 10;

template <typename T>
class CodeScanner {
 public:
  CodeScanner(const Problem& problem, const T* packed, bool differences)
      : problem_(problem), packed_(packed), differences_(differences), d2_((problem.d + 1) / 2 * 2) {}

  void scan(const Visit& visit, int64_t query, TopK& best) {
    const int64_t tiles = std::max<int64_t>(1, kRoundedBytes / (2 * d2_ * kTile));
    const int64_t section = tiles * kTile;
    for (int64_t row = visit.first; row < visit.last; row += section) {
      const int64_t rows = std::min(section, visit.last - row);
      round_rows(visit.start + row, rows, section);
      for (int64_t t = 0; t < visit.count && visit.tasks[t].limit > row; t += kGroup) {
        const Task* tasks = visit.tasks + t;
        const int group = static_cast<int>(std::min<int64_t>(kGroup, visit.count - t));
        round_queries(tasks, group, query, best);
        for (int64_t tile = 0; tile < rows && row + tile < tasks->limit; tile += kTile) {
          offer_tile(tasks, group, visit.start, row, tile, best);
        }
      }
    }
  }

 private:
  using Value = at::BFloat16;
  static constexpr int kGroup = TileProducts::kGroup;
  static constexpr int64_t kTile = TileProducts::kTile;

  // Round the `rows` rows from `at` on into tiles, and note of each what its score takes beside a product.
  void round_rows(int64_t at, int64_t rows, int64_t section) {
    const int64_t d = problem_.d;
    const int64_t padded = (rows + kTile - 1) / kTile * kTile;
    Value* tiles = take(tiles_, section * d2_);
    float* bias = take(bias_, section);
    const float* from = as_float(packed_ + at * d, rows * d, take(rows_, section * d));
    centre_of(from, rows);
    std::fill(tiles, tiles + padded * d2_, Value(0));
    largest_ = {0.0f, 0.0f};
    for (int64_t row = 0; row < padded; ++row) {
      bias[row] = kNever;
      if (row >= rows || (problem_.bias && problem_.bias[at + row] == kNever)) {
        continue;
      }
      const float length = round_difference(from + row * d, centre_.data(), take(one_, d2_));
      bias[row] = differences_ ? -length : 0.0f;
      put(take(one_, d2_), tiles + row / kTile * kTile * d2_, row % kTile);
      largest_ = {std::max(largest_.length, sizes_.length), std::max(largest_.moved, sizes_.moved)};
    }
  }

  // The mean of some rows. Any point would do; near the rows it leaves short differences.
  void centre_of(const float* rows, int64_t count) {
    centre_.assign(problem_.d, 0.0f);
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t i = 0; i < problem_.d; ++i) {
        centre_[i] += rows[row * problem_.d + i];
      }
    }
    for (float& value : centre_) {
      value /= static_cast<float>(count);
      value = std::isfinite(value) ? value : 0.0f;
    }
    centre_length_ = norm_above(product_of(centre_.data(), centre_.data(), problem_.d), problem_.d);
  }

  // Round `from` less `centre` (or `from` alone) to `to`; the square of its length, and in sizes_ how far it moved.
  float round_difference(const float* from, const float* centre, Value* to) {
    const int64_t d = problem_.d;
    float* apart = take(apart_, d);
    float* moved = take(moved_, d);
    for (int64_t i = 0; i < d; ++i) {
      apart[i] = centre ? from[i] - centre[i] : from[i];
      to[i] = apart[i];
      moved[i] = static_cast<float>(to[i]) - apart[i];
    }
    std::fill(to + d, to + d2_, Value(0));
    const float squares = product_of(apart, apart, d);
    sizes_ = {norm_above(squares, d), norm_above(product_of(moved, moved, d), d)};
    return squares;
  }

  void put(const Value* values, Value* tile, int64_t row) const {
    if (!products_.paired()) {
      for (int64_t i = 0; i < d2_; ++i) {
        tile[i * kTile + row] = values[i];
      }
      return;
    }
    for (int64_t i = 0; i < d2_; i += 2) {
      std::memcpy(tile + i * kTile + 2 * row, values + i, 2 * sizeof(Value));
    }
  }

  // Round the queries of some tasks, and note what each of its scores takes beside a product: its part of the exact
  // score, and the most by which that may be wrong.
  void round_queries(const Task* tasks, int count, int64_t query, TopK& best) {
    Value* values = take(queries_, kGroup * d2_);
    const float factor = differences_ ? 2.0f : 1.0f;
    for (int m = 0; m < count; ++m) {
      const float* x = problem_.x + (query + tasks[m].query) * problem_.d;
      const float squares = round_difference(x, differences_ ? centre_.data() : nullptr, values + m * d2_);
      const float own = differences_ ? -squares : product_of(x, centre_.data(), problem_.d);
      // Rounding: <a, r> - <a', r'> = <a - a', r> + <a', r - r'>.
      const float moved =
          factor * (sizes_.moved * largest_.length + (sizes_.length + sizes_.moved) * largest_.moved);
      // And float32, in all the sums here and in that of the exact score.
      const float reach = sizes_.length + largest_.length;
      const float terms = differences_ ? reach * reach : sizes_.length * (centre_length_ + largest_.length);
      const float slack = static_cast<float>(4 * problem_.d + 64) * 0x1p-24f * terms
          + static_cast<float>(problem_.d) * 0x1p-124f;
      const float above = (moved + slack) * 1.0001f;
      if (!(terms < 1e37f) || !std::isfinite(above)) {
        best.mark_uncertified(tasks[m].query);
      }
      constants_[m] = own + above;
    }
  }

  void offer_tile(const Task* tasks, int count, int64_t start, int64_t row, int64_t tile, TopK& best) {
    const float* bias = bias_.data() + tile;
    const Vec factor(differences_ ? 2.0f : 1.0f);
    products_.product(
        count, queries_.data(), tiles_.data() + tile * d2_, d2_, [&](int m, int64_t column, Vec low, Vec high) {
          const Vec constant(constants_[m]);
          const auto score = [&](const Vec& product, int64_t at) {
            return at::vec::fmadd(product, factor, Vec::loadu(bias + at)) + constant;
          };
          const int64_t first = row + tile + column;
          offer_panel(score(low, column), score(high, column + kLanes), tasks[m], start, first, nullptr, best);
        });
  }

  const Problem& problem_;
  const T* packed_;
  bool differences_;
  int64_t d2_;
  TileProducts products_;
  Sizes sizes_{}, largest_{}; // of the last vector that was rounded, and the largest of the rows
  float centre_length_ = 0;
  float constants_[kGroup] = {};
  std::vector<float> rows_, centre_, apart_, moved_, bias_;
  std::vector<Value> one_, tiles_, queries_;
};

} // namespace torch_ivf_module
