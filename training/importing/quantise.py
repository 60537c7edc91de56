"""Quantises an imported graph to int8 with its owner's example pictures."""

import contextlib
import io
import logging

from registry.model.image.decode import Pixels
from registry.model.plans.openvino import import_openvino
from training.publishing.export import to_int8

log = logging.getLogger(__name__)

MIN_PICTURES = 16


def quantise(graph: bytes, calibration: Pixels) -> dict[str, bytes]:
    """The int8 files of a bundle, or none if they cannot be made; then a warning says why.

    Args:
        graph: the ONNX graph of the bundle.
        calibration: uint8 (N, H, W, C), example pictures, from which int8 takes its ranges.
    """
    if len(calibration) < MIN_PICTURES:
        log.warning(
            "int8 is left out: it needs %d examples, and there are %d",
            MIN_PICTURES,
            len(calibration),
        )
        return {}
    with contextlib.suppress(ImportError):
        openvino = import_openvino()
        reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
        try:
            return to_int8(reader.convert(reader.load(io.BytesIO(graph))), calibration)
        except Exception as error:  # noqa: BLE001 - engines raise errors of many types
            log.warning("int8 is left out: %s", str(error).partition("\n")[0])
            return {}
    log.warning("int8 is left out: OpenVINO or NNCF is not installed")
    return {}
