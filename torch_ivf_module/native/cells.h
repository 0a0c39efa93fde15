// The cells that queries read: the rows of one list that have one group. As `cells_probed` of functional/cells.py.
//
// Q queries, P probes, G groups, C cells.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace torch_ivf_module {

struct Cells {
  const int64_t* groups; // (G,) distinct, ascending
  const int64_t* keys; // (C,) ascending: number of the list * G + position of the group
  int64_t group_count, count;
};

// The number of the cell of each pair of a query and a list (Q, P), C where the list has no row of the group.
inline std::vector<int64_t> cells_of_pairs(
    const Cells& cells, const int64_t* probed, const int64_t* groups, int64_t queries, int64_t probes) {
  std::vector<int64_t> found(queries * probes, cells.count);
  const int64_t *last_group = cells.groups + cells.group_count, *last_key = cells.keys + cells.count;
  for (int64_t q = 0; q < queries; ++q) {
    const int64_t* const group = std::lower_bound(cells.groups, last_group, groups[q]);
    if (group == last_group || *group != groups[q]) {
      continue;
    }
    for (int64_t i = q * probes; i < (q + 1) * probes; ++i) {
      const int64_t wanted = probed[i] * cells.group_count + (group - cells.groups);
      const int64_t* const key = std::lower_bound(cells.keys, last_key, wanted);
      if (key != last_key && *key == wanted) {
        found[i] = key - cells.keys;
      }
    }
  }
  return found;
}

// The different ones of some cells, cell C among them and last; each of `found` becomes its position among these.
inline std::vector<int64_t> distinct_cells(std::vector<int64_t>& found, int64_t count) {
  std::vector<int64_t> used;
  if (static_cast<int64_t>(found.size()) * 8 < count) { // fewer than a table would have entries
    used = found;
    used.push_back(count);
    std::sort(used.begin(), used.end());
    used.erase(std::unique(used.begin(), used.end()), used.end());
    for (int64_t& cell : found) {
      cell = std::lower_bound(used.begin(), used.end(), cell) - used.begin();
    }
    return used;
  }
  std::vector<int64_t> number(count + 1, 0);
  number[count] = 1;
  for (const int64_t cell : found) {
    number[cell] = 1;
  }
  for (int64_t cell = 0; cell <= count; ++cell) {
    if (number[cell]) {
      number[cell] = used.size();
      used.push_back(cell);
    }
  }
  for (int64_t& cell : found) {
    cell = number[cell];
  }
  return used;
}

} // namespace torch_ivf_module
