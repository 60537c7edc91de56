"""``convoy import FILE.onnx``: a graph that the user exported."""

from pathlib import Path

from registry.core.errors import UsageError
from registry.model.graphs.onnx_rules import MAX_GRAPH_BYTES
from training.importing.sources.base import Request, Source, SourceModel


class OnnxFile(Source):
    """A file. It says neither its labels nor its preprocessing."""

    name = "onnx"
    metavar = "FILE"
    help = "an ONNX file; the default for FILE"

    def load(self, request: Request) -> SourceModel:
        """The graph in the file."""
        file = Path(request.what)
        return SourceModel(
            name=file.stem,
            graph=read_file(file, MAX_GRAPH_BYTES),
            origin=file.name,
            labels=request.labels or (),
            preprocess=request.preprocess,
        )


def read_file(file: Path, limit: int) -> bytes:
    """The bytes of ``file``; ``UsageError`` if it cannot be read or has more than ``limit``."""
    try:
        if (size := file.stat().st_size) > limit:
            raise UsageError(f"{file} has {size:,} bytes; at most {limit:,} are accepted")
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error


SOURCE = OnnxFile()
