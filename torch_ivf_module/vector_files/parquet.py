"""Parquet files: columns of numbers, and of lists of one length, streamed within their row groups.

n rows, d dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import require
from .arrays import Array, BadData, Contents

__all__ = ["parquet"]

_BATCH = 4096  # rows that are decoded at a time


def parquet(path: Path) -> Contents:
    """The columns of numbers (n,) and of lists of numbers (n, d) of a file (extra `parquet`); others say their type."""
    arrow = require("pyarrow", "parquet")
    library = require("pyarrow.parquet", "parquet")
    file = library.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    arrays, rows = {}, file.metadata.num_rows
    for field in file.schema_arrow:
        kind = field.type.storage_type if isinstance(field.type, arrow.BaseExtensionType) else field.type
        types = arrow.types
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        value = kind.value_type if is_list else kind
        if types.is_floating(value) or types.is_integer(value):
            d = kind.list_size if types.is_fixed_size_list(kind) else None
            column = _Column(path, file, field.name, np.dtype(value.to_pandas_dtype()), is_list, d)
            arrays[field.name] = Array(column.shape, column.dtype.kind, column.read)
        else:
            arrays[field.name] = _no_numbers(f"holds values of type {field.type}, not floats or integers", rows)
    return Contents(arrays)


def _no_numbers(problem: str, rows: int) -> Array:
    return Array((rows,), "?", lambda start, end: None, problem)


class _Column:
    """A column, of which rows are read in order without decoding any twice, or from the start of a row group."""

    def __init__(
        self, path: Path, file: Any, name: str, dtype: np.dtype[Any], is_list: bool, d: int | None = None
    ) -> None:
        self._path, self._file, self._name, self.dtype, self._is_list = path, file, name, dtype, is_list
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])  # of the row groups, and the end of the last
        self.shape: tuple[int, ...] = (file.metadata.num_rows,)
        if is_list:
            self.shape = (self.shape[0], self._width() if d is None else d)
        self._rest = self._parts(0)
        self._part: Any = None  # what was decoded last: rows self._at:self._end
        self._at = self._end = 0

    def read(self, start: int, end: int) -> Any:
        """Rows start:end, (end - start, d) or (end - start,)."""
        found, row = np.empty((end - start, *self.shape[1:]), self.dtype), start
        while row < end:
            self._seek(row)
            upto = min(end, self._end)
            found[row - start : upto - start] = self._numbers(self._part.slice(row - self._at, upto - row), row)
            row = upto
        return found

    def _seek(self, row: int) -> None:
        """Decode until `row` is in the part that was decoded last."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if row < self._at or self._starts[group] > self._end:
            self._rest, self._at, self._end = self._parts(group), int(self._starts[group]), int(self._starts[group])
        while row >= self._end:
            self._part = next(self._rest)
            self._at, self._end = self._end, self._end + len(self._part)

    def _parts(self, group: int, size: int = _BATCH) -> Iterator[Any]:
        """Arrow arrays of the rows from the start of a row group on."""
        groups = list(range(group, len(self._starts) - 1))
        batches = self._file.iter_batches(size, row_groups=groups, columns=[self._name], use_threads=False)
        for batch in batches:
            column = batch.column(self._name)
            yield getattr(column, "storage", column)

    def _width(self) -> int:
        """The length of the first list; 0 if there is none, or if it is null."""
        first = next((column[0] for column in self._parts(0, 1) if len(column)), None)
        return len(first) if first is not None and first.is_valid else 0

    def _numbers(self, column: Any, first: int) -> Any:
        """Rows from `first` on as an array of numpy, (n, d) or (n,); BadData names one that does not hold numbers."""
        values = column
        self._refuse(column.is_null(), first, "is null")
        if self._is_list:
            lengths = require("pyarrow.compute", "parquet").list_value_length(column)
            d = self.shape[1]
            self._refuse(np.asarray(lengths) != d, first, f"does not hold {d} numbers as row 0 does")
            values = column.flatten()
            self._refuse(np.asarray(values.is_null()).reshape(-1, d).any(1), first, "holds null")
        return values.to_numpy(zero_copy_only=False).reshape(len(column), *self.shape[1:])

    def _refuse(self, wrong: Any, first: int, why: str) -> None:
        rows = np.flatnonzero(np.asarray(wrong))
        if rows.size:
            raise BadData(f"{self._path}, {self._name!r}: row {first + rows[0]} {why}")
