"""``ModelInfer``: from a message to the pipeline's request, and from its result to a message."""

from collections.abc import Iterator, Mapping
from typing import Any

from registry.core.errors import ConvoyError, InvalidTensor
from service.http.bodies.base64_text import paced
from service.http.bodies.reading import within
from service.inference.requests import InputImage, Result
from service.protocols.grpc_v2 import inference_pb2 as pb
from service.protocols.openinference.infer_response import (
    MAX_OUTPUTS,
    Output,
    WantedOutput,
    outputs_of,
    refuse_shared_memory,
    wanted_outputs,
)
from service.protocols.openinference.tensors import (
    ENCODED,
    JSON_BYTES_PER_VALUE,
    PIXELS,
    TensorHead,
    checked_head,
    images_from_bytes,
    images_from_values,
)
from service.settings import Settings

# So many typed values become Python's numbers at a time, which take eight times the memory.
VALUES_AT_ONCE = 4096
Parameters = Mapping[str, pb.InferParameter]


class InferImages:
    """The images of a message, and the outputs that it wants."""

    isolates_errors = False
    """An error of one image fails the whole request: the protocol has no error for one image."""

    def __init__(self, message: pb.ModelInferRequest, settings: Settings) -> None:
        self._message = message
        self._settings = settings
        self._wanted: list[WantedOutput] = []

    def __iter__(self) -> Iterator[InputImage | ConvoyError]:
        message = self._message
        outputs = message.outputs[: MAX_OUTPUTS + 1]  # one more is refused
        requested = [(each.name, _plain(each.parameters)) for each in outputs]
        self._wanted = wanted_outputs(requested, _plain(message.parameters))
        if len(message.inputs) != 1:
            raise InvalidTensor(f"the request has {len(message.inputs)} inputs; send exactly one")
        tensor = message.inputs[0]
        refuse_shared_memory(_plain(tensor.parameters))
        head = checked_head(tensor.datatype, tensor.shape, self._settings.max_batch)
        if message.raw_input_contents:
            if len(message.raw_input_contents) != 1:
                raise InvalidTensor(
                    f"the request has {len(message.raw_input_contents)} raw_input_contents; send "
                    "one for its one input"
                )
            raw = memoryview(message.raw_input_contents[0])
            return images_from_bytes(head, raw, self._settings.max_image_bytes)
        if (
            head.datatype != ENCODED
            and JSON_BYTES_PER_VALUE * head.values > self._settings.max_json_bytes
        ):
            # As many as JSON could hold. Python makes an object of each value; raw bytes need none.
            raise InvalidTensor(
                f"the tensor has {head.values:,} typed values; send it as raw_input_contents"
            )
        return _typed(head, tensor.contents, self._settings.max_image_bytes)

    def answer(self, result: Result) -> pb.ModelInferResponse:
        """The answer: raw if the message's input was raw, otherwise with typed contents."""
        outputs = outputs_of(result, self._wanted)
        is_raw = bool(self._message.raw_input_contents)
        return pb.ModelInferResponse(
            model_name=result.served.name,
            model_version=str(result.served.version),
            id=self._message.id,
            outputs=[_tensor(each, is_raw) for each in outputs],
            raw_output_contents=[each.binary() for each in outputs] if is_raw else (),
        )


def _typed(
    head: TensorHead, contents: pb.InferTensorContents, max_bytes: int
) -> Iterator[InputImage | ConvoyError]:
    """The images in a tensor's typed contents; raises ``InvalidTensor`` if they do not fit it."""
    if head.datatype != ENCODED:
        numbers: Any = contents.uint_contents if head.datatype == PIXELS else contents.fp32_contents
        with paced(JSON_BYTES_PER_VALUE * head.values):
            return iter(images_from_values(head, _slices(numbers)))
    if len(contents.bytes_contents) != head.images:
        raise InvalidTensor(
            f"the tensor has {len(contents.bytes_contents)} bytes_contents; its shape "
            f"{list(head.shape)} needs {head.images}"
        )
    return (within(each, max_bytes) for each in contents.bytes_contents)


def _slices(numbers: Any) -> Iterator[list[float]]:
    """Typed values in slices of ``VALUES_AT_ONCE``."""
    return (
        numbers[start : start + VALUES_AT_ONCE] for start in range(0, len(numbers), VALUES_AT_ONCE)
    )


def _tensor(output: Output, is_raw: bool) -> pb.ModelInferResponse.InferOutputTensor:
    tensor = pb.ModelInferResponse.InferOutputTensor(
        name=output.wanted.name, datatype=output.datatype, shape=output.shape
    )
    if is_raw:
        return tensor
    if output.datatype == ENCODED:
        tensor.contents.bytes_contents.extend(text.encode() for text in output.texts)
    else:
        tensor.contents.fp32_contents.extend(output.plain())
    return tensor


def _plain(parameters: Parameters) -> dict[str, Any]:
    """A map of parameters as the JSON of HTTP would have it."""
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None)
        for name, value in parameters.items()
    }
