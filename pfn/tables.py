"""Columns of numbers in CSV files, for the command line."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Table = dict[str, list[str]]
RESTED = 5.0  # seconds after which nobody is writing a line


class NothingYet(ValueError):
    """There is no file, or nothing in it, which whoever waits for one expects."""


def read_csv(path: Path, *, growing: bool = False) -> Table:
    """The columns of a CSV file with a header, by name, as text.

    The separator is a comma, semicolon or tab, whichever the header has most of.

    Args:
        growing: whether the file is being written: a last line without its end is left out until
            the file has rested for some seconds.

    Raises:
        ValueError: no such file, no rows, a repeated name, or a row of another length.
    """
    if not path.is_file():
        raise NothingYet(f"Expected a CSV file; there is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {path} as text in UTF-8: {error}.") from error
    if growing and time.time() - path.stat().st_mtime < RESTED:
        text = text[: text.rfind("\n") + 1]
    lines = text.splitlines()
    separator = max(",;\t", key=(lines or [""])[0].count)
    reader = csv.reader(lines, delimiter=separator)
    header = [name.strip() for name in next(reader, [])]
    rows = [(reader.line_num, row) for row in reader if row]
    if not lines:
        raise NothingYet(f"Expected a header in {path}; it is empty.")
    if not header or len(set(header)) < len(header):
        raise ValueError(f"Expected a header of distinct names in {path}; got {header}.")
    if not rows:
        raise NothingYet(f"Expected rows below the header of {path}; there are none.")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"Expected {len(header)} values as in the header on line {line} of {path};"
                f" got {len(row)}."
            )
    return dict(zip(header, map(list, zip(*(row for _, row in rows), strict=True)), strict=True))


def to_numbers(table: Table, names: Sequence[str], path: Path) -> NDArray[np.float64]:
    """Columns `names` side by side (row, name).

    Raises:
        ValueError: a column that is missing, or a value that is no number.
    """
    missing = [name for name in names if name not in table]
    if missing or not names:
        wanted = missing or "of features"
        raise ValueError(f"Expected columns {wanted} in {path}; it has {list(table)}.")
    return np.column_stack([_to_column(table[name], name, path) for name in names])


def write_csv(path: Path, columns: Mapping[str, Sequence[float]]) -> None:
    """Writes columns by name, with all digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _to_column(values: Sequence[str], name: str, path: Path) -> list[float]:
    column = []
    for row, value in enumerate(values, start=1):
        try:
            column.append(float(value))
        except ValueError:
            raise ValueError(
                f"Expected numbers in column {name!r} of {path}; got {value!r} in row {row}. Leave"
                " such columns out with --features, or encode them as numbers."
            ) from None
    return column
