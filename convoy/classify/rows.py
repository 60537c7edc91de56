"""One row for each picture, and how CSV, JSON lines and Parquet write it."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Literal

from msgspec import Struct
from msgspec.structs import replace

from registry.core.errors import UsageError
from registry.core.names import one_line
from registry.model.manifest import ClassScore


class Answer(Struct, frozen=True, kw_only=True):
    """What a version answered for one picture: the most probable classes, best first."""

    model: str
    version: int
    alias: str | None
    plan: str
    predictions: tuple[ClassScore, ...]
    request_id: str
    timings_ms: dict[str, float]


class Row(Struct, frozen=True, kw_only=True):
    """One picture with its answer, or with an ``error``. The columns are in this order."""

    uri: str
    sha256: str
    model: str = ""
    version: int | None = None
    plan: str = ""
    label: str = ""
    probability: float | None = None
    top_k: tuple[tuple[str, float], ...] = ()
    error: str = ""

    @property
    def is_answered(self) -> bool:
        """Whether a version has answered."""
        return self.version is not None and not self.error


COLUMNS = Row.__struct_fields__
# A byte of a name that is not UTF-8: Python has it as one of these characters, and ``to_arrow``
# writes it as this text.
ESCAPED_BYTE = re.compile(r"\\u(dc[89a-f][0-9a-f])")
DAMAGED = "it is not a row of convoy classify"
# The field ``top_k`` of a model with thousands of classes is longer than csv's default limit.
csv.field_size_limit(2**31 - 1)


def row_of(uri: str, sha256: str, answer: Answer | str) -> Row:
    """The row of a picture with its answer, or with the text of an error."""
    if isinstance(answer, str):
        return Row(uri=uri, sha256=sha256, error=one_line(answer))
    best = answer.predictions[0] if answer.predictions else None
    return Row(
        uri=uri,
        sha256=sha256,
        model=answer.model,
        version=answer.version,
        plan=answer.plan,
        label=best.label if best else "",
        probability=best.probability if best else None,
        top_k=tuple((each.label, each.probability) for each in answer.predictions),
    )


class Csv:
    """RFC 4180, in UTF-8. An empty field stands for a missing value."""

    head = ",".join(COLUMNS) + "\n"

    def encode(self, row: Row) -> bytes:
        """The row as one record."""
        buffer = io.StringIO()
        values = {name: _or_null(getattr(row, name)) for name in COLUMNS}
        if row.top_k:
            values["top_k"] = json.dumps(row.top_k, ensure_ascii=False)
        # With QUOTE_MINIMAL, Python 3.11 does not quote a field with a carriage return.
        quote_all = any("\r" in str(value) for value in values.values())
        quoting: Literal[0, 1] = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
        csv.writer(buffer, lineterminator="\n", quoting=quoting).writerow(values.values())
        return buffer.getvalue().encode("utf-8", "surrogateescape")

    def begins(self, text: bytes) -> bool:
        """Whether ``text`` could be the torn first line of a file in this format."""
        return self.head.encode().startswith(text)

    def records(self, file: BinaryIO) -> Iterator[tuple[int, Row]]:
        """Each complete row, with the position after it. A torn last record is left out.

        Raises:
            ValueError: a record that is not the last cannot be read.
        """
        lines = _CompleteLines(file)
        reader = csv.reader(lines, strict=True)
        try:
            if next(reader, None) != list(COLUMNS):
                raise ValueError("it has other columns")
            for record in reader:
                yield lines.position, _from_csv(record)
        except csv.Error as error:
            if not lines.ended:  # otherwise the last record was torn inside quotes
                raise ValueError(str(error)) from error


class JsonLines:
    """One JSON object a line; null stands for a missing value."""

    head = ""

    def encode(self, row: Row) -> bytes:
        """The row as one line."""
        record = {name: _or_null(getattr(row, name)) for name in COLUMNS}
        try:
            return f"{json.dumps(record, ensure_ascii=False)}\n".encode()
        except UnicodeEncodeError:  # the name of a file that is not UTF-8
            return f"{json.dumps(record)}\n".encode()

    def begins(self, text: bytes) -> bool:
        """As ``Csv.begins``."""
        start = f'{{"{COLUMNS[0]}": '.encode()
        return text.startswith(start) or start.startswith(text)

    def records(self, file: BinaryIO) -> Iterator[tuple[int, Row]]:
        """As ``Csv.records``."""
        lines = _CompleteLines(file)
        for line in lines:
            record = json.loads(line)
            if not isinstance(record, dict) or list(record) != list(COLUMNS):
                raise ValueError("it has other columns")
            yield lines.position, row_from(record)


Format = Csv | JsonLines


class _CompleteLines:
    """The lines of a file that end with a line break. ``position`` is after the last one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position = 0
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self.position += len(line)
            yield line.decode("utf-8", "surrogateescape")
        self.ended = True


def row_from(record: dict[str, Any]) -> Row:
    """The row in a record of JSON lines or Parquet; raises ``ValueError``."""
    try:
        pairs = [(str(label), float(value)) for label, value in record["top_k"] or ()]
        version, probability = record["version"], record["probability"]
        texts = ("uri", "sha256", "model", "plan", "label", "error")
        return Row(
            **{name: str(record[name] or "") for name in texts},
            version=None if version is None else int(version),
            probability=None if probability is None else float(probability),
            top_k=tuple(pairs),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(DAMAGED) from error


def _from_csv(record: list[str]) -> Row:
    if len(record) != len(COLUMNS):
        raise ValueError(DAMAGED)
    fields: dict[str, Any] = {
        name: text or None for name, text in zip(COLUMNS, record, strict=True)
    }
    fields["top_k"] = json.loads(fields["top_k"] or "[]")
    return row_from(fields)


def _or_null(value: Any) -> Any:
    return None if value in ("", ()) else value


def import_pyarrow() -> Any:
    """The package pyarrow; raises ``UsageError`` if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("Parquet needs the package pyarrow; install it, or use CSV") from error
    return pyarrow


def parquet_schema(arrow: Any) -> Any:
    """The columns of a Parquet file; ``top_k`` is a list."""
    pair = arrow.struct([("label", arrow.string()), ("probability", arrow.float64())])
    kinds = {
        "version": arrow.int64(),
        "probability": arrow.float64(),
        "top_k": arrow.list_(pair),
    }
    return arrow.schema([(name, kinds.get(name, arrow.string())) for name in COLUMNS])


def to_arrow(rows: Sequence[Row], arrow: Any) -> Any:
    r"""A table of ``rows``. Parquet holds UTF-8 only: a byte FF of a name becomes ``\udcff``."""
    records = [{name: _or_null(getattr(row, name)) for name in COLUMNS} for row in rows]
    for record in records:
        record["uri"] = record["uri"].encode("utf-8", "backslashreplace").decode()
        record["top_k"] = record["top_k"] and [
            {"label": label, "probability": value} for label, value in record["top_k"]
        ]
    return arrow.Table.from_pylist(records, schema=parquet_schema(arrow))


def from_arrow(record: dict[str, Any]) -> Row:
    """The row in a record of ``to_arrow``; raises ``ValueError``."""
    top_k = [(each["label"], each["probability"]) for each in record["top_k"] or ()]
    row = row_from({**record, "top_k": top_k})
    return replace(row, uri=ESCAPED_BYTE.sub(lambda found: chr(int(found[1], 16)), row.uri))
