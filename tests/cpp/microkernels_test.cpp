// The building blocks of the scan, for the instruction set that this is compiled for, against sums in double.
// Exits with 77 where the CPU does not have it.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "certify.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

using namespace torch_ivf_module;

namespace {

#define CHECK(condition)                                                        \
  if (!(condition)) {                                                           \
    std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                               \
  }

std::vector<float> random_numbers(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& value : out) {
    value = normal(generator);
  }
  return out;
}

double product(const float* x, const float* y, int64_t d) {
  double sum = 0;
  for (int64_t i = 0; i < d; ++i) {
    sum += static_cast<double>(x[i]) * y[i];
  }
  return sum;
}

void check_every_half() {
  std::vector<Half> halves(1 << 16);
  std::vector<BFloat16> rounded(1 << 16);
  for (uint32_t bits = 0; bits < halves.size(); ++bits) {
    halves[bits].bits = rounded[bits].bits = static_cast<uint16_t>(bits);
  }
  std::vector<float> wide(halves.size()), one(1);
  CHECK(as_float(halves.data(), 1, halves.size(), wide.data()) == wide.data());
  for (uint32_t bits = 0; bits < halves.size(); ++bits) {
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
        : exponent == 0                ? std::ldexp(mantissa, -24)
                                       : std::ldexp(1024 + mantissa, exponent - 25);
    const double expected = std::copysign(size, bits >> 15 ? -1.0 : 1.0);
    for (float found : {wide[bits], *as_float(&halves[bits], 1, 1, one.data())}) {
      CHECK(found == expected || (std::isnan(found) && std::isnan(expected)));
      CHECK(std::signbit(found) == std::signbit(expected));
    }
  }
  as_float(rounded.data(), 1, rounded.size(), wide.data());
  for (uint32_t bits = 0; bits < rounded.size(); ++bits) {
    uint32_t found;
    std::memcpy(&found, &wide[bits], sizeof(found));
    CHECK(found == bits << 16);
  }
}

template <typename Code>
void check_coded_rows(int64_t d) {
  constexpr int64_t kCount = 3;
  const int64_t width = row_bytes<Code>(d);
  std::vector<Code> rows(kCount * width);
  std::vector<float> decoded(kCount * d);
  const float range[2] = {0.3f, -7.0f};
  for (int64_t i = 0; i < kCount * width; ++i) {
    rows[i].byte = static_cast<uint8_t>(37 * i + 11);
  }
  for (int64_t row = 0; row < kCount; ++row) {
    std::memcpy(&rows[(row + 1) * width - kRangeBytes], range, sizeof(range));
  }
  as_float(rows.data(), kCount, d, decoded.data());
  for (int64_t i = 0; i < kCount * d; ++i) {
    const int64_t at = i % d;
    const bool two = width < d + kRangeBytes;
    const uint8_t byte = rows[i / d * width + (two ? at / 2 : at)].byte;
    const int code = !two ? byte : at % 2 ? byte >> 4 : byte & 15;
    const volatile float product = static_cast<float>(code) * range[0];
    CHECK(decoded[i] == product + range[1]);
  }
}

void check_registers() {
  const std::vector<float> from = random_numbers(kLanes * 40, 1);
  std::vector<float> to(kLanes * 50, 0.0f);
  transpose(from.data(), 4 * 40, to.data(), 50);
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) {
      CHECK(to[j * 50 + i] == from[i * 40 + j]);
    }
  }
  const Vec rows[4] = {
      Vec::loadu(&from[0]), Vec::loadu(&from[kLanes]), Vec::loadu(&from[2 * kLanes]), Vec::loadu(&from[3 * kLanes])};
  const std::vector<float> ones(kLanes, 1.0f);
  float sums[4];
  sums_of(rows, sums);
  for (int i = 0; i < 4; ++i) {
    const double expected = product(&from[i * kLanes], ones.data(), kLanes);
    CHECK(std::abs(sums[i] - expected) < 1e-5);
    CHECK(std::abs(sum_of(rows[i]) - expected) < 1e-5);
  }
  std::vector<float> scores(kLanes);
  for (unsigned which : {0u, 1u, (1u << kLanes) - 1, (1u << kLanes) / 3, 1u << (kLanes - 1)}) {
    for (int64_t i = 0; i < kLanes; ++i) {
      scores[i] = which >> i & 1 ? 2.0f : (i % 3 == 0 ? 1.0f : i % 3 == 1 ? -INFINITY : NAN);
    }
    CHECK(exceeding(Vec::loadu(scores.data()), Vec(1.0f)) == which);
  }
  CHECK(exceeding(Vec(0.0f), Vec(kNever)) == (1u << kLanes) - 1);
}

// Within the errors that certify.h allows.
void check_products(int64_t d) {
  const std::vector<float> x = random_numbers(kQueries * d, 2), rows = random_numbers(kPanel * d, 3);
  const std::vector<float> bias = random_numbers(kPanel, 4), origin = random_numbers(d, 5);
  std::vector<float> panel(kPanel * d);
  std::array<const float*, kQueries> queries;
  for (int m = 0; m < kQueries; ++m) {
    queries[m] = &x[m * d];
  }
  for (int64_t count : {kPanel, kPanel - 1, int64_t{1}}) {
    pack_panels(rows.data(), count, d, panel.data());
    for (int64_t row = 0; row < kPanel; ++row) {
      for (int64_t i = 0; i < d; ++i) {
        CHECK(panel[i * kPanel + row] == (row < count ? rows[row * d + i] : 0.0f));
      }
    }
  }
  pack_panels(rows.data(), kPanel, d, panel.data());
  panel_product<kQueries>(queries, panel.data(), bias.data(), d, [&](int m, Vec low, Vec high) {
    float scores[kPanel];
    low.store(scores);
    high.store(scores + kLanes);
    for (int64_t row = 0; row < kPanel; ++row) {
      const float* r = &rows[row * d];
      const double size = norm(queries[m], d) * norm(r, d) + std::abs(bias[row]);
      CHECK(std::abs(scores[row] - (product(queries[m], r, d) + bias[row])) <= panel_rounding(d) * size);
    }
  });
  centre_panels(panel.data(), kPanel, d, origin.data());
  CHECK(panel[(d - 1) * kPanel + 3] == rows[3 * d + d - 1] - origin[d - 1]);
  float scores[kFew][kRows], distances[kFew][kRows];
  const std::array<const float*, kFew> few = {queries[0], queries[1], queries[2]};
  std::array<RowReader<float>, kRows> some;
  for (int row = 0; row < kRows; ++row) {
    some[row] = {&rows[row * d], d};
  }
  row_sums<kFew, false>(few, some, d, scores);
  row_sums<kFew, true>(few, some, d, distances);
  for (int m = 0; m < kFew; ++m) {
    for (int row = 0; row < kRows; ++row) {
      const float* r = &rows[row * d];
      const double size = norm(queries[m], d) * norm(r, d);
      CHECK(std::abs(scores[m][row] - product(queries[m], r, d)) <= row_rounding(d) * size);
      CHECK(std::abs(exact_score(false, queries[m], r, d) - product(queries[m], r, d)) <= row_rounding(d) * size);
      std::vector<float> apart(d);
      for (int64_t i = 0; i < d; ++i) {
        apart[i] = queries[m][i] - r[i];
      }
      const double distance = product(apart.data(), apart.data(), d);
      CHECK(std::abs(exact_score(true, queries[m], r, d) + distance) <= row_rounding(d) * distance);
      CHECK(std::abs(distances[m][row] - distance) <= row_rounding(d) * distance);
    }
  }
}

} // namespace

int main() {
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq")) {
    return 77;
  }
#elif defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return 77;
  }
#endif
  check_every_half();
  for (int64_t d = 2; d < 80; ++d) {
    check_coded_rows<Code8>(d);
    check_coded_rows<Code4>(d);
  }
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040); // as torch.set_flush_denormal(True) does
  std::vector<float> wide(1);
  const Half smallest{1};
  CHECK(*as_float(&smallest, 1, 1, wide.data()) == 0x1p-24f);
  _mm_setcsr(before);
#endif
  check_registers();
  for (int64_t d : {1, 3, 4, 7, 8, 16, 33, 64, 128, 255, 256, 257, 300, 1000, 4096}) {
    check_products(d);
  }
  std::puts("ok");
  return 0;
}
