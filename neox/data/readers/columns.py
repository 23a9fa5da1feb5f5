"""Documents of a table's column: Parquet files and Arrow batches. Rows count from 0, as in pyarrow and datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neox.data.readers.faults import Fault, Faults, missing_key, one_line, optional, text_of

ROWS = 1024  # decoded at a time
READ_AHEAD = 1 << 20  # bytes; without it pyarrow reads the column of a whole row group at once


def check_parquet(path: Path, text_key: str) -> None:
    """Raises Fault where `path` is no Parquet file, or has no column of texts called `text_key`. Reads its end only."""
    with _open(path) as file:
        check_column(file.schema_arrow, str(path), text_key, file.metadata.num_rows)


def read_parquet(path: Path, text_key: str, faults: Faults) -> Iterator[tuple[str, float]]:
    """One document a row; only the column `text_key` is read, row group by row group.

    Yields each document with its share of the file's bytes. A row group that cannot be read is one fault, of as many
    documents as it still had; the next one is read all the same.
    """
    try:
        file = _open(path)
    except Fault as fault:
        faults.add(fault)
        return
    with file:
        rows = file.metadata.num_rows
        try:
            check_column(file.schema_arrow, str(path), text_key, rows)
        except Fault as fault:
            faults.add(fault)
            return
        share = path.stat().st_size / max(rows, 1)
        end = 0
        for group in range(file.num_row_groups):
            row, end = end, end + file.metadata.row_group(group).num_rows
            batches = file.iter_batches(ROWS, [group], columns=[text_key], use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                except Exception as error:  # whatever the decoder of a damaged page says: OSError, ArrowInvalid, ...
                    what = f"row {row}: damaged ({one_line(error)}); the rest of row group {group} is lost"
                    faults.add(Fault("damaged", f"{path}: {what}: fetch the file or make it again", end - row))
                    break
                if batch is None:
                    break
                yield from column_texts(batch, str(path), row, text_key, share, faults)
                row += batch.num_rows


def _open(path: Path) -> Any:
    arrow, parquet = optional("pyarrow", str(path)), optional("pyarrow.parquet", str(path))
    try:
        return parquet.ParquetFile(path, buffer_size=READ_AHEAD, page_checksum_verification=True)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's error, not the format's
            raise
        what = "no Parquet file, or one that was cut short" if path.stat().st_size else "it is empty, no Parquet file"
        raise Fault("damaged", f"{path}: {what} ({one_line(error)}): fetch it or make it again") from None


def check_column(schema: Any, where: str, text_key: str, rows: int) -> None:
    """Raises Fault, of all `rows`, where the Arrow schema has no column of texts called `text_key`."""
    if text_key not in schema.names:
        raise missing_key(where, text_key, schema.names, rows)
    found = schema.field(text_key).type
    if _as_bytes(found) is None:
        message = f"{where}: column {text_key!r} holds {found}, not text; set data.text_key to the column of the text"
        raise Fault("no text", message, rows)


def column_texts(
    table: Any, where: str, first_row: int, text_key: str, share: float, faults: Faults
) -> Iterator[tuple[str, float]]:
    """The texts of a record batch or a table whose first row is row `first_row` of `where`, each with `share`."""
    # As bytes, decoded row by row: Arrow itself does not look whether a string is UTF-8, and would fail for all rows.
    column = table.column(text_key)
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = column.cast(_as_bytes(column.type)).to_pylist()
    for row, value in enumerate(values, start=first_row):
        try:
            text = text_of(value, f"{where}: row {row}", text_key)
        except Fault as fault:
            faults.add(fault)
            continue
        yield text, share


def _as_bytes(kind: Any) -> Any:
    """The Arrow type of bytes that a column of texts is cast to, or of lists of bytes; None where it holds no texts."""
    import pyarrow

    types = pyarrow.types
    text = (types.is_string, types.is_large_string, types.is_string_view)
    raw = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null)
    inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    if types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    if not any(test(inner) for test in (*text, *raw)):
        return None
    return pyarrow.large_binary() if inner is kind else pyarrow.large_list(pyarrow.large_binary())
