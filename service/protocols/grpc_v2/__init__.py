"""The Open Inference Protocol, version 2, over gRPC. Each worker has a server on a shared port.

Imports grpcio, ``service.http``, ``service.inference``, ``service.protocols.openinference`` and
``service.state``. Decides nothing. Needs the extra ``grpc``.
"""
