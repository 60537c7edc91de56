"""Finds the images in a body of MLflow's scoring protocol: JSON in four forms, or CSV."""

import csv
import io
import sys
from mmap import mmap

import msgspec
from msgspec import Struct
from werkzeug.exceptions import abort

from service.http.bodies.base64_text import count, first_byte, paced
from service.http.bodies.json_body import check_count, check_structure, is_text, parse

COLUMN = "image"
FORMS = ("dataframe_records", "dataframe_split", "inputs", "instances")
# A row may have further columns. They are ignored, as by MLflow's server.
STRINGS_PER_IMAGE = 16
# The names of an instance's member with the image. Vertex AI names it "b64".
_MEMBERS = (COLUMN, "b64")
MAX_BLANK_LINES = 1000
_MISSING = msgspec.Raw(b"null")

# The csv module's limit is shorter than a picture in base64. The body's length has been checked.
csv.field_size_limit(sys.maxsize)


class ScoringBody(Struct, frozen=True):
    """The JSON of a request, which has one of the four forms. Other members are ignored."""

    dataframe_records: msgspec.Raw = _MISSING
    dataframe_split: msgspec.Raw = _MISSING
    inputs: msgspec.Raw = _MISSING
    instances: msgspec.Raw = _MISSING


class SplitTable(Struct, frozen=True, forbid_unknown_fields=True):
    """A table as ``pandas.DataFrame.to_dict(orient="split")`` writes it."""

    data: list[list[msgspec.Raw]]
    columns: list[str] = []
    index: msgspec.Raw = _MISSING


_BODY = msgspec.json.Decoder(ScoringBody)
_ROWS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_SPLIT = msgspec.json.Decoder(SplitTable)
_VALUES = msgspec.json.Decoder(list[msgspec.Raw])
_MEMBERS_OF = msgspec.json.Decoder(dict[str, msgspec.Raw])


def texts_in_json(body: bytes | mmap, max_images: int) -> tuple[list[msgspec.Raw], bool]:
    """The JSON strings of the images, and whether they have escapes.

    Raises:
        HTTPException: 400, the body has none of the forms, or two, or no image; 413, it has more
            than ``max_images``.
    """
    has_escapes = check_structure(body, max_images, STRINGS_PER_IMAGE)
    parsed = parse(body, _BODY, f"an object with one of {', '.join(FORMS)}")
    present = [name for name in FORMS if getattr(parsed, name) is not _MISSING]
    if len(present) != 1:
        abort(
            400,
            f"the JSON body has {' and '.join(present) or 'none of the inputs'}; it must have "
            f"exactly one of {', '.join(FORMS)}",
        )
    (form,) = present
    try:
        texts = _COLUMNS[form](getattr(parsed, form))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        abort(400, f"{form} cannot be read: {error}")
    return _checked(texts, max_images), has_escapes


def texts_in_csv(body: bytes | mmap, max_images: int) -> list[msgspec.Raw]:
    """The images of a CSV table with a header line, as JSON strings.

    Raises:
        HTTPException: 400, the body is not such a table in UTF-8, or has no image; 413, it has
            more than ``max_images``.
    """
    texts: list[msgspec.Raw] = []
    max_commas = (max_images + 1) * STRINGS_PER_IMAGE
    if count(body, b",", max_commas + 1) > max_commas:
        abort(413, f"the CSV table has more than {max_commas} values; send fewer images or columns")
    try:
        with paced(len(body)):
            rows = csv.reader(io.StringIO(bytes(body).decode("utf-8-sig"), newline=""), strict=True)
            place = _place(next(rows, []))
            blank_lines = 0
            for row in rows:
                if row:
                    check_count(len(texts) + 1, max_images)
                    texts.append(_as_json(row[place]))
                elif (blank_lines := blank_lines + 1) > MAX_BLANK_LINES:  # pandas skips them, too
                    abort(400, f"the CSV table has more than {MAX_BLANK_LINES} blank lines")
    except (UnicodeDecodeError, csv.Error, IndexError) as error:
        abort(400, f"the body is not a CSV table in UTF-8: {error}")
    return _checked(texts, max_images)


def _records(raw: msgspec.Raw) -> list[msgspec.Raw]:
    rows = _ROWS.decode(raw)
    for row in rows:
        if COLUMN not in row:
            _place(list(row))
    return [row[COLUMN] for row in rows]


def _split(raw: msgspec.Raw) -> list[msgspec.Raw]:
    table = _SPLIT.decode(raw)
    place = _place(table.columns)
    if any(len(row) != len(table.columns) for row in table.data):
        abort(
            400,
            f"each row of dataframe_split must have {len(table.columns)} values, "
            "one for each column",
        )
    return [row[place] for row in table.data]


def _values(raw: msgspec.Raw) -> list[msgspec.Raw]:
    """The images of ``inputs`` or ``instances``: one, a list, or a column of a table."""
    if first_byte(raw) == b"{":
        raw = _member(raw)
    if is_text(raw):
        return [raw]
    return [_member(each) for each in _VALUES.decode(raw)]


_COLUMNS = {
    "dataframe_records": _records,
    "dataframe_split": _split,
    "inputs": _values,
    "instances": _values,
}


def _member(raw: msgspec.Raw) -> msgspec.Raw:
    """The image of a JSON object, by the member's name; any other value unchanged."""
    for _ in range(2):  # {"image": {"b64": "…"}}
        if first_byte(raw) != b"{":
            break
        members = _MEMBERS_OF.decode(raw)
        name = next((each for each in _MEMBERS if each in members), None)
        if name is None:
            _place(list(members))
        raw = members[str(name)]
    return raw


def _place(columns: list[str]) -> int:
    """The place of the column with the images; answers 400 if it is missing."""
    if COLUMN not in columns:
        found = ", ".join(repr(each[:40]) for each in columns[:8]) or "none"
        abort(400, f"the input has no column {COLUMN!r}; its columns: {found}")
    return columns.index(COLUMN)


def _checked(texts: list[msgspec.Raw], max_images: int) -> list[msgspec.Raw]:
    if not texts:
        abort(400, "the input has no image; send at least one")
    check_count(len(texts), max_images)
    for position, each in enumerate(texts):
        if not is_text(each):
            abort(400, f"image {position} is not a string; send the image as base64")
    return texts


def _as_json(text: str) -> msgspec.Raw:
    """``text`` as a JSON string, whose characters are base64 or are refused as such later."""
    return msgspec.Raw(b'"' + text.encode() + b'"')
