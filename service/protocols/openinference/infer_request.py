"""``InferRequest``: one inference request, from its body to its images and the wanted outputs."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from mmap import mmap
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Struct
from werkzeug.exceptions import abort

from registry.core.errors import ConvoyError, InvalidTensor
from service.http.bodies.base64_text import count, first_byte, paced
from service.http.bodies.json_body import check_escapes, images_of, is_text, parse
from service.http.bodies.reading import (
    body_buffer,
    body_length,
    check_coding,
    json_buffer,
    raw_image,
)
from service.inference.requests import InputImage, Result
from service.protocols.inference_app import HttpAnswer
from service.protocols.openinference.infer_response import (
    WantedOutput,
    refuse_shared_memory,
    wanted_outputs,
    write,
)
from service.protocols.openinference.tensors import (
    ENCODED,
    PIXELS,
    TensorHead,
    checked_head,
    images_from_bytes,
    images_from_values,
)
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# Limits of the JSON members that are not image data.
MAX_MEMBER_BYTES = 16 * 1024
MAX_SHAPE_BYTES = 128
MAX_ID_CHARACTERS = 1024
# So much JSON of a tensor becomes Python's numbers at a time, which take 16 times the memory.
NUMBERS_BYTES = 8 * 1024
HEADER_LENGTH = "HTTP_INFERENCE_HEADER_CONTENT_LENGTH"
_LENGTH = re.compile(r"[0-9]{1,9}")
Member = TypeVar("Member")
_NOTHING = msgspec.Raw(b"null")
# Without these, the nested lists of a tensor become one flat list.
_BRACKETS_AND_SPACE = b"[] \t\r\n"


class InputTensor(Struct, frozen=True):
    """The one input of a request. Its name is not used: the datatype says what the tensor is.

    ``data`` is missing if the tensor follows the JSON in binary form.
    """

    name: str
    datatype: str
    shape: msgspec.Raw
    data: msgspec.Raw = _NOTHING
    parameters: msgspec.Raw = _NOTHING


class RequestedOutput(Struct, frozen=True):
    """One output that the client wants; by default it gets all of them."""

    name: str
    parameters: dict[str, Any] | None = None


class InferBody(Struct, frozen=True):
    """The JSON of an inference request.

    Members that could be long are parsed only after a check of their length.
    """

    inputs: tuple[InputTensor]
    outputs: msgspec.Raw = _NOTHING
    id: str | None = None
    parameters: msgspec.Raw = _NOTHING


_BODY = msgspec.json.Decoder(InferBody)
# None stands for a member that is null.
_SHAPE = msgspec.json.Decoder(list[int])
_PARAMETERS = msgspec.json.Decoder(dict[str, Any] | None)
_OUTPUTS = msgspec.json.Decoder(list[RequestedOutput] | None)
_WHOLE_NUMBERS = msgspec.json.Decoder(list[int])
_NUMBERS = msgspec.json.Decoder(list[float])
_VALUES = msgspec.json.Decoder(list[msgspec.Raw])
_ONE_VALUE = msgspec.json.Decoder(tuple[msgspec.Raw])


class InferRequest:
    """One request. Its body is read when its images are iterated; ``write`` may follow that."""

    isolates_errors = False
    """An error of one image fails the whole request: the protocol has no error for one image."""

    def __init__(self, environ: "WSGIEnvironment", settings: Settings) -> None:
        self._environ = environ
        self._settings = settings
        self._id = ""
        self._wanted: list[WantedOutput] = []

    def __iter__(self) -> Iterator[InputImage | ConvoyError]:
        check_coding(self._environ)
        if self._environ.get(HEADER_LENGTH) == "0":  # Triton's raw binary request
            self._wanted = wanted_outputs([], {"binary_data_output": True})
            return iter((raw_image(self._environ, self._settings),))
        head, binary = self._split()
        body = parse(head, _BODY, "an inference request of the Open Inference Protocol")
        self._id = body.id or ""
        if len(self._id) > MAX_ID_CHARACTERS:
            abort(400, f"the id has more than {MAX_ID_CHARACTERS} characters")
        parameters = _member(body.parameters, _PARAMETERS, "parameters") or {}
        outputs = _member(body.outputs, _OUTPUTS, "outputs") or []
        self._wanted = wanted_outputs(
            [(each.name, each.parameters) for each in outputs], parameters
        )
        return self._images_of(body.inputs[0], binary)

    def write(self, result: Result, request_id: str) -> HttpAnswer:
        """The wanted outputs, as JSON or in the binary form."""
        return write(result, self._wanted, self._id)

    def _split(self) -> tuple[bytes | mmap | memoryview, memoryview]:
        """The JSON of the body, and the tensor in binary form after it.

        Raises:
            HTTPException: the header Inference-Header-Content-Length is wrong (400), or the body
                is too long (413).
        """
        text = self._environ.get(HEADER_LENGTH)
        if text is None:
            return json_buffer(self._environ, self._settings), memoryview(b"")
        length = body_length(self._environ, self._settings.max_body_bytes)
        if not _LENGTH.fullmatch(text) or int(text) > length:
            abort(
                400,
                f"Inference-Header-Content-Length is {text[:20]!r}; it must be a number of bytes, "
                f"and the body has {length:,}",
            )
        if int(text) > self._settings.max_json_bytes:
            abort(413, f"the JSON has {text} bytes; send at most {self._settings.max_json_bytes:,}")
        body = memoryview(body_buffer(self._environ["wsgi.input"], length))
        return body[: int(text)], body[int(text) :]

    def _images_of(
        self, tensor: InputTensor, binary: memoryview
    ) -> Iterator[InputImage | ConvoyError]:
        shape = _member(tensor.shape, _SHAPE, "shape", MAX_SHAPE_BYTES) or []
        head = checked_head(tensor.datatype, shape, self._settings.max_batch)
        parameters = _member(tensor.parameters, _PARAMETERS, "parameters of an input") or {}
        refuse_shared_memory(parameters)
        limit = self._settings.max_image_bytes
        if (size := parameters.get("binary_data_size")) is not None:
            if size != binary.nbytes:
                raise InvalidTensor(
                    f"binary_data_size is {size!r}, but {binary.nbytes:,} bytes follow the JSON"
                )
            return images_from_bytes(head, binary, limit)
        if binary.nbytes:
            raise InvalidTensor(
                f"{binary.nbytes:,} bytes follow the JSON, but the input has no binary_data_size"
            )
        if tensor.data is _NOTHING:
            raise InvalidTensor(
                "the input has no data; send data, or binary_data_size and the tensor after JSON"
            )
        if head.datatype == ENCODED:
            return images_of(*_texts(head, tensor.data), limit)
        with paced(memoryview(tensor.data).nbytes):
            return iter(images_from_values(head, _numbers(head, tensor.data)))


def _member(
    raw: msgspec.Raw,
    decoder: "msgspec.json.Decoder[Member]",
    name: str,
    max_bytes: int = MAX_MEMBER_BYTES,
) -> Member | None:
    """A member of the JSON, parsed by ``decoder``; None if it is missing.

    Raises:
        HTTPException: 400, it is longer than ``max_bytes``, or cannot be parsed.
    """
    if raw is _NOTHING:
        return None
    size = memoryview(raw).nbytes
    if size > max_bytes:
        abort(400, f"the {name} have {size:,} bytes of JSON; at most {max_bytes:,} are accepted")
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        abort(400, f"the {name} cannot be read: {error}")


def _texts(head: TensorHead, data: msgspec.Raw) -> tuple[list[msgspec.Raw], bool]:
    """The strings of a ``BYTES`` tensor in JSON, and whether they have escapes.

    Raises:
        InvalidTensor: there are more or fewer strings than the shape says, or other values.
    """
    text = bytes(data)
    has_escapes = check_escapes(text)
    # Escaped quotes are counted, too; base64 has none.
    strings = count(text, b'"', 2 * head.images + 1) // 2
    commas = count(text, b",", 2 * head.images)  # a data URL contains a comma
    if strings == head.images and commas < 2 * head.images:
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):
            found = [_only(each) for each in _VALUES.decode(text)]
            if len(found) == head.images and all(map(is_text, found)):
                return found, has_escapes
    raise InvalidTensor(
        f"data does not fit the shape {list(head.shape)} of the BYTES tensor; send one base64 "
        "string for each image"
    )


def _only(value: msgspec.Raw) -> msgspec.Raw:
    """The one element of a JSON list, or ``value`` itself if it is not a list."""
    if first_byte(value) == b"[":
        (element,) = _ONE_VALUE.decode(value)
        return element
    return value


def _numbers(head: TensorHead, data: msgspec.Raw) -> Iterator[Sequence[float]]:
    """The numbers of a tensor in JSON, nested or flat, in slices.

    Raises:
        InvalidTensor: there are more or fewer values than the shape says; or, while the slices are
            iterated, a value is not a number.
    """
    flat = bytes(data).translate(None, _BRACKETS_AND_SPACE)
    number = flat.count(b",") + 1
    if number != head.values:
        raise InvalidTensor(
            f"the tensor has {number:,} values; its shape {list(head.shape)} needs {head.values:,}"
        )
    return (_decoded(head, b"[" + each + b"]") for each in _slices(flat))


def _slices(flat: bytes) -> Iterator[bytes]:
    """``flat`` in slices of about ``NUMBERS_BYTES``, cut at commas, without those commas."""
    start = 0
    while start < len(flat):
        comma = flat.find(b",", start + NUMBERS_BYTES)
        end = len(flat) if comma < 0 else comma
        yield flat[start:end]
        start = end + 1


def _decoded(head: TensorHead, text: bytes) -> Sequence[float]:
    """The numbers of a JSON list; whole ones if all are and the tensor has pixels."""
    if head.datatype == PIXELS:  # whole numbers take a third of the time
        with contextlib.suppress(msgspec.MsgspecError):
            return _WHOLE_NUMBERS.decode(text)
    try:
        return _NUMBERS.decode(text)
    except msgspec.MsgspecError as error:
        raise InvalidTensor(f"a value of the tensor is not a number: {error}") from error
