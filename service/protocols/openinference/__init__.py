"""The Open Inference Protocol, version 2, over HTTP: KServe's and Triton's clients speak it.

Imports ``service.http``, ``service.inference`` and ``service.state``. Decides nothing.
Sources: github.com/kserve/open-inference-protocol, and the binary tensor data, classification,
statistics and model configuration extensions in github.com/triton-inference-server/server.
"""
