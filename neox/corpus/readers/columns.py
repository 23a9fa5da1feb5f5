"""Documents of a column of Parquet and Arrow files.

Rows count from 0, as in pyarrow and datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

from neox.corpus.readers.chunks import CHUNK_BYTES, Chunk, Document
from neox.corpus.readers.errors import ErrorPolicy, ReadError, missing_key, text_of
from neox.corpus.readers.urls import is_url, open_raw, size_of
from neox.system.console import one_line
from neox.system.optional import optional

ROWS = 1024  # decoded at a time
READ_AHEAD = 1 << 20  # bytes; without it pyarrow reads the column of a whole row group at once


def check_parquet(name: str, text_key: str) -> None:
    """Check that a file is Parquet and has a column `text_key` of texts.

    Reads its end only. Raises ReadError.
    """
    with _parquet(name) as file:
        check_column(file.schema_arrow, name, text_key, file.metadata.num_rows)


def split_parquet(name: str) -> list[int]:
    """Find the row groups where chunks of about `CHUNK_BYTES` begin.

    Just 0 where the file is damaged.
    """
    starts, size = [0], 0
    with suppress(ReadError), _parquet(name) as file:
        for group in range(file.num_row_groups):
            if size >= CHUNK_BYTES:
                starts, size = [*starts, group], 0
            size += file.metadata.row_group(group).total_byte_size
    return starts


def read_parquet(chunk: Chunk, text_key: str, policy: ErrorPolicy, meta_key: str | None = None) -> Iterator[Document]:
    """Read one document a row, row group by row group; only the columns in use.

    Each document comes with its share of the file's bytes. A row group that cannot be read is one error, of as
    many documents as it still had; the next row group is read all the same.
    """
    name = chunk.name
    try:
        file = _parquet(name)
    except ReadError as read_error:
        policy.add(read_error)
        return
    with file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        groups = range(chunk.start, len(counts) if chunk.end is None else chunk.end)
        try:
            check_column(file.schema_arrow, name, text_key, sum(counts[group] for group in groups))
        except ReadError as read_error:
            policy.add(read_error)
            return
        columns = [text_key, *([meta_key] if meta_key in file.schema_arrow.names else [])]
        share = (size_of(name) or 0) / max(sum(counts), 1)
        end = sum(counts[: chunk.start])
        for group in groups:
            row, end = end, end + counts[group]
            batches = file.iter_batches(ROWS, [group], columns=columns, use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                except Exception as error:  # whatever the decoder of a damaged page says: OSError, ArrowInvalid, ...
                    what = f"row {row}: damaged ({one_line(error)}); the rest of row group {group} is lost"
                    policy.add(ReadError("damaged", f"{name}: {what}: fetch the file or make it again", end - row))
                    break
                if batch is None:
                    break
                yield from column_documents(batch, name, row, text_key, share, policy, meta_key)
                row += batch.num_rows


def _parquet(name: str) -> Any:
    arrow, parquet = optional("pyarrow", name, "data"), optional("pyarrow.parquet", name, "data")
    try:
        # By path pyarrow reads the file itself, without Python's lock.
        place = open_raw(name) if is_url(name) else name
        return parquet.ParquetFile(place, buffer_size=READ_AHEAD, page_checksum_verification=True)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or (is_url(name) and "reached" in str(error))):
            raise  # the system's error, not the format's
        what = "no Parquet file, or one that was cut short" if size_of(name) else "it is empty, no Parquet file"
        raise ReadError("damaged", f"{name}: {what} ({one_line(error)}): fetch it or make it again") from None


def check_arrow(name: str, text_key: str) -> None:
    """Check that a file is Arrow and has a column `text_key` of texts.

    Reads its start only. Raises ReadError.
    """
    with open_raw(name) as file:
        check_column(_arrow(name, file)[0], name, text_key, 1)


def read_arrow(chunk: Chunk, text_key: str, policy: ErrorPolicy, meta_key: str | None = None) -> Iterator[Document]:
    """Read one document a row of an Arrow file, batch by batch.

    Both formats are read: IPC stream and IPC file.
    """
    name, row = chunk.name, 0
    with open_raw(name) as file:
        try:
            schema, batches = _arrow(name, file)
            check_column(schema, name, text_key, 1)
        except ReadError as read_error:
            policy.add(read_error)
            return
        taken = 0
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # ArrowInvalid, OSError, as the damage goes
                what = f"row {row}: damaged ({one_line(error)}); the rest of the file is lost"
                policy.add(ReadError("damaged", f"{name}: {what}: fetch the file or make it again"))
                return
            if batch is None:
                return
            share = (file.tell() - taken) / max(len(batch), 1)
            taken = file.tell()
            for first in range(0, len(batch), ROWS):
                rows = batch.slice(first, ROWS)
                yield from column_documents(rows, name, row + first, text_key, share, policy, meta_key)
            row += len(batch)


def _arrow(name: str, file: IO[bytes]) -> tuple[Any, Iterator[Any]]:
    """Schema and record batches of an open Arrow file."""
    arrow = optional("pyarrow", name, "data")
    try:
        whole = file.read(6) == b"ARROW1"
        file.seek(0)
        if whole:
            reader = arrow.ipc.open_file(file)
            return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
        stream = arrow.ipc.open_stream(file)
        return stream.schema, iter(stream)
    except (arrow.ArrowException, OSError) as error:
        what = f"no Arrow file, or one that was cut short ({one_line(error)})"
        raise ReadError("damaged", f"{name}: {what}: fetch it or make it again") from None


def check_column(schema: Any, where: str, text_key: str, rows: int) -> None:
    """Check that an Arrow schema has a column `text_key` of texts.

    Raises ReadError, of all `rows`.
    """
    if text_key not in schema.names:
        raise missing_key(where, text_key, schema.names, rows)
    dtype = schema.field(text_key).type
    if _as_bytes(dtype) is None:
        message = f"{where}: column {text_key!r} holds {dtype}, not text; set data.text_key to the column of the text"
        raise ReadError("no text", message, rows)


def column_documents(
    table: Any,
    where: str,
    first_row: int,
    text_key: str,
    share: float,
    policy: ErrorPolicy,
    meta_key: str | None = None,
) -> Iterator[Document]:
    """Read the documents of a record batch or a table, each with `share` bytes.

    Its first row is row `first_row` of `where`.
    """
    # As bytes, decoded row by row: Arrow itself does not look whether a string is UTF-8, and would fail for all rows.
    column = table.column(text_key)
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = column.cast(_as_bytes(column.type)).to_pylist()
    metas = table.column(meta_key).to_pylist() if meta_key in table.schema.names else [None] * len(values)
    for row, (value, meta) in enumerate(zip(values, metas, strict=True), start=first_row):
        try:
            text = text_of(value, f"{where}: row {row}", text_key)
        except ReadError as read_error:
            policy.add(read_error)
            continue
        yield Document(text, share, meta)


def _as_bytes(kind: Any) -> Any:
    """Arrow type of bytes to cast a column of texts to; None where it holds none.

    Of a column of lists of texts it is a list of bytes.
    """
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
