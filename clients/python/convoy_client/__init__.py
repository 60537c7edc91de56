"""Classifies pictures with a Convoy service over HTTP.

``Client`` waits for its answers, ``AsyncClient`` awaits them. They differ only in input and output:
the other modules build requests, decide about retries and read answers for both. The package
imports httpx and nothing of Convoy's own packages.
"""

from convoy_client.async_client import AsyncClient
from convoy_client.client import Client
from convoy_client.errors import (
    ConvoyError,
    Forbidden,
    InvalidAnswer,
    InvalidImage,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerError,
    ServiceUnreachable,
    Timeout,
    Unauthorized,
    Unavailable,
)
from convoy_client.exchange import VERSION
from convoy_client.images import ImageInput
from convoy_client.results import (
    Canary,
    Classification,
    Failure,
    Metadata,
    Model,
    ModelDetails,
    Prediction,
    Result,
)

__version__ = VERSION
__all__ = [
    "AsyncClient",
    "Canary",
    "Classification",
    "Client",
    "ConvoyError",
    "Failure",
    "Forbidden",
    "ImageInput",
    "InvalidAnswer",
    "InvalidImage",
    "InvalidRequest",
    "Metadata",
    "Model",
    "ModelDetails",
    "NotFound",
    "Overloaded",
    "Prediction",
    "Result",
    "ServerError",
    "ServiceUnreachable",
    "Timeout",
    "Unauthorized",
    "Unavailable",
    "__version__",
]
