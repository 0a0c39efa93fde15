// Rows that are stored as codes of 8 or 4 bits, a few at a time in panels, and bounds of their scores for coded queries.
//
// A row is V = m + s j, with codes j from 0 to 2 c - 1. With a query y, relative to the origin where scores are distances,
// coded as y = t i + t' i' + e, with integers of one byte: <y, V> = (m + c s) sum(y) + s t <i, j - c> + s t' <i', j - c> +
// s <e, j - c>, and the last term is at most |e| |s| c sqrt(d). With i alone e is so large, where rows are far from the
// origin compared with their distances, that the bounds exclude little. docs/codes.md has the proof, with the rounding of
// float32.
//
// d dim, M queries.
#pragma once

#include "certify.h"
#include "codes.h"
#include "rows.h"

namespace torch_ivf_module {

template <typename Code>
constexpr int kCentre = 128;
template <>
constexpr int kCentre<Code4> = 8;

// Groups of four dimensions in four bytes. With 4 bits there are two: dimensions 0, 2, 4, 6 and dimensions 1, 3, 5, 7.
template <typename Code>
constexpr int64_t kGroups = 1;
template <>
constexpr int64_t kGroups<Code4> = 2;

// Words of four bytes that cover the codes of a row. The last may contain a part of the range that follows the codes.
template <typename Code>
inline int64_t words_of(int64_t d) {
  return (row_bytes<Code>(d) - kRangeBytes + 3) / 4;
}

// Groups of four dimensions of a row. Queries have zeros beyond dimension d, so the values of rows there do not matter.
template <typename Code>
inline int64_t groups_of(int64_t d) {
  return words_of<Code>(d) * kGroups<Code>;
}

// Columns of a panel, of kCodedRows numbers each: s, m + c s, |s| c sqrt(d), a bound of the norm, and the bias, rounded up.
enum Column { kScale, kMiddle, kSpread, kReach, kBias, kColumns };

// Relative rounding errors: product_share of (norm of the query) * (largest number of the row) * sqrt(d), and bias_share of
// the bias.
inline float product_share(int64_t d) {
  return static_cast<float>(row_rounding(d)) + 32 * kUnit;
}
inline float bias_share(int64_t d) {
  return sum_rounding(d) + 2 * static_cast<float>(row_rounding(d)) + 16 * kUnit;
}

// Some panels of the rows of a list.
template <typename Code>
class RowPanels {
 public:
  RowPanels(int64_t d, int64_t panels)
      : d_(d), size_(groups_of<Code>(d) * Panel::kGroup), codes_(panels * size_), columns_(panels * kColumns * kCodedRows) {}

  const uint8_t* codes(int64_t panel) const {
    return &codes_[panel * size_];
  }
  const float* column(int64_t panel, Column which) const {
    return &columns_[(panel * kColumns + which) * kCodedRows];
  }

  // Lay out rows [first, first + count) of a segment. Returns false where one is so large, or not a number, that nothing
  // can be said of its scores. Rows from `next` on will be wanted after those before `last`.
  bool fill(const Segment& segment, int64_t first, int64_t count, int64_t last, int64_t next) {
    bool known = true;
    for (int64_t row = first; row < first + count; row += kCodedRows) {
      const int64_t soon = row + kAheadRows, panel = (row - first) / kCodedRows;
      const char* ahead = row_at<char>(segment.packed, 0, 1) + (soon < last ? soon : next + soon - last) * row_bytes<Code>(d_);
      known &= fill_panel(panel, segment, row, std::min(kCodedRows, first + count - row), ahead);
    }
    return known;
  }

 private:
  static constexpr int64_t kAheadRows = 2 * kCodedRows;

  bool fill_panel(int64_t panel, const Segment& segment, int64_t first, int64_t count, const char* ahead) {
    const auto* rows = reinterpret_cast<const uint8_t*>(row_at<Code>(segment.packed, first, d_));
    int64_t stride = row_bytes<Code>(d_);
    float* columns = &columns_[panel * kColumns * kCodedRows];
    float *scale = columns + kScale * kCodedRows, *offset = columns + kMiddle * kCodedRows, *bias = columns + kBias * kCodedRows;
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(scale + i, rows + (i + 1) * stride - kRangeBytes, sizeof(float));
      std::memcpy(offset + i, rows + (i + 1) * stride - kRangeBytes / 2, sizeof(float));
      for (int64_t byte = 0; byte < stride; byte += 64) { // what the hardware reads ahead ends with a page
        __builtin_prefetch(ahead + i * stride + byte);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      bias[i] = segment.bias ? segment.bias[first + i] : 0.0f;
    }
    for (int64_t i = count; i < kCodedRows; ++i) {
      scale[i] = offset[i] = 0;
      bias[i] = kNever;
    }
    if (count < kCodedRows) { // there may be no memory behind them
      rows = static_cast<const uint8_t*>(std::memcpy(take(bytes_, kCodedRows * stride), rows, count * stride));
    }
    turn(rows, stride, &codes_[panel * size_]);
    return derive(columns);
  }

  // The layout of Panel, of rows `stride` bytes apart.
  void turn(const uint8_t* rows, int64_t stride, uint8_t* codes) {
    const int64_t words = words_of<Code>(d_), whole = words / kLanes * kLanes;
    uint8_t* turned = kGroups<Code> == 1 ? codes : take(turned_, words * Panel::kGroup);
    for (int64_t word = 0; word < whole; word += kLanes) {
      for (int64_t row = 0; row < kCodedRows; row += kLanes) {
        auto* to = reinterpret_cast<float*>(turned + word * Panel::kGroup) + row;
        transpose(rows + row * stride + 4 * word, stride, to, kCodedRows);
      }
    }
    for (int64_t row = 0; row < kCodedRows; ++row) {
      for (int64_t word = whole; word < words; ++word) {
        std::memcpy(turned + word * Panel::kGroup + 4 * row, rows + row * stride + 4 * word, 4);
      }
    }
    for (int64_t at = 0; kGroups<Code> == 2 && at < words * Panel::kGroup; at += Panel::kGroup, codes += 2 * Panel::kGroup) {
      for (int64_t i = 0; i < Panel::kGroup; ++i) {
        codes[i] = turned[at + i] & 15;
        codes[Panel::kGroup + i] = turned[at + i] >> 4;
      }
    }
  }

  // The columns of a panel, in which there are scales, offsets and biases.
  bool derive(float* columns) const {
    const float root = std::sqrt(static_cast<float>(d_)) * (1 + 4 * kUnit), centre = kCentre<Code>;
    unsigned known = ~0u;
    for (int64_t row = 0; row < kCodedRows; row += kLanes) {
      const auto column = [&](Column which) { return columns + which * kCodedRows + row; };
      const Vec scale = Vec::loadu(column(kScale)), offset = Vec::loadu(column(kMiddle)), bias = Vec::loadu(column(kBias));
      const Vec size = absolute(scale), zero(0.0f);
      const Vec reach = fmadd(fmadd(size, Vec(2 * centre), absolute(offset)), Vec(root), zero);
      known &= exceeding(Vec(kLargestNorm), reach);
      fmadd(scale, Vec(centre), offset).store(column(kMiddle));
      fmadd(size, Vec(centre * root), zero).store(column(kSpread));
      reach.store(column(kReach));
      fmadd(bias, Vec(1 - bias_share(d_)), zero).store(column(kBias));
    }
    return (known & ((1u << kLanes) - 1)) == (1u << kLanes) - 1;
  }

  int64_t d_, size_; // bytes of the codes of a panel
  std::vector<uint8_t> codes_, bytes_, turned_;
  std::vector<float> columns_;
};

// The codes of the queries of a search, and for each query the values that its bounds need.
class RowQueries {
 public:
  struct Query {
    float scale[2]; // t and t'
    int32_t start[2]; // of sums of products with i and i', for a centre of 1
    float sum, error, size, base, slack;
    bool known; // whether bounds can be given
  };

  // `x` (Q, d); scores are distances where there is an origin (d), and products where it is null.
  RowQueries(const Problem& p, const float* x, const float* origin)
      : d_(p.d),
        padded_((p.d + kPadding - 1) / kPadding * kPadding),
        in_halves_(p.dtype == Dtype::kCode4),
        queries_(p.queries),
        codes_(2 * p.queries * padded_) {
    constexpr double kNanoseconds = 1; // an estimate, of a number
    const double origin_norm = origin ? norm(origin, d_) : 0;
    const int64_t team = team_for(kNanoseconds * static_cast<double>(p.queries * d_), p.within.threads);
    parallel_items((p.queries + kBatch - 1) / kBatch, team, [&](int64_t item, int64_t) {
      std::vector<float> values(padded_ + kLanes);
      for (int64_t q = item * kBatch; q < std::min(p.queries, (item + 1) * kBatch); ++q) {
        queries_[q] = coded(x + q * d_, origin, origin_norm, values.data(), &codes_[2 * q * padded_]);
      }
    });
  }

  const Query& operator[](int64_t query) const {
    return queries_[query];
  }
  // i, or i'.
  const int8_t* codes(int64_t query, int which) const {
    return &codes_[(2 * query + which) * padded_];
  }

 private:
  static constexpr int64_t kBatch = 64, kPadding = std::max<int64_t>(8, kLanes);

  Query coded(const float* x, const float* origin, double origin_norm, float* values, int8_t* codes) const {
    const Residual r = residual(x, origin, d_, values);
    double offset = 0;
    for (int64_t i = 0; i < d_ && origin; ++i) {
      offset += static_cast<double>(values[i]) * origin[i];
    }
    if (in_halves_) {
      order(values);
    }
    Query query{};
    query.size = norm_of(r.squares, d_);
    query.scale[0] = scale_of(r.most, kQueryLevels);
    query.start[0] = -quantise(values, padded_, query.scale[0], 1 / query.scale[0], codes).sum;
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < padded_; ++i) {
      sum += values[i];
      squares += static_cast<double>(values[i]) * values[i];
    }
    const Residual rest = less_codes(values, query.scale[0], codes);
    query.scale[1] = scale_of(rest.most, kQueryLevels);
    const Quantised lost = quantise(values, padded_, query.scale[1], 1 / query.scale[1], codes + padded_);
    query.start[1] = -lost.sum;
    query.error = error_of(lost.squares, norm_of(rest.squares, d_), query.scale[1], d_);
    query.sum = static_cast<float>(sum);
    const double share = row_rounding(d_) + 16.0 * kUnit;
    query.base = origin ? static_cast<float>(-0.5 * squares - offset) : 0.0f;
    query.slack = origin ? static_cast<float>(share * (squares + query.size * origin_norm)) * (1 + 4 * kUnit) + 1e-30f : 1e-30f;
    query.known = query.size < kLargestNorm && (query.size == 0 || query.size >= kSmallestNorm) && origin_norm < kLargestNorm;
    return query;
  }

  // Reorder values (padded,) in the order of the groups of dimensions, see kGroups.
  void order(float* values) const {
    for (int64_t i = 0; i < padded_; i += 8) {
      float eight[8];
      std::copy_n(values + i, 8, eight);
      for (int64_t j = 0; j < 8; ++j) {
        values[i + j / 2 + j % 2 * 4] = eight[j];
      }
    }
  }

  // Subtract the coded vector from `values`, in place: the residual.
  Residual less_codes(float* values, float scale, const int8_t* codes) const {
    Vec most(0.0f), squares(0.0f);
    for (int64_t i = 0; i < padded_; i += kLanes) {
      float coded[kLanes];
      std::copy_n(codes + i, kLanes, coded);
      const Vec value = fmadd(Vec::loadu(coded), Vec(-scale), Vec::loadu(values + i));
      value.store(values + i);
      most = larger(most, absolute(value));
      squares = fmadd(value, value, squares);
    }
    return {largest_of(most), sum_of(squares)};
  }

  int64_t d_, padded_;
  bool in_halves_; // codes of rows have 4 bits
  std::vector<Query> queries_;
  std::vector<int8_t> codes_;
};

} // namespace torch_ivf_module
