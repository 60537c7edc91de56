#!/bin/sh
# Remove from /opt/venv what the service never loads: setuptools, tests, headers, plugins for other
# devices, readers of other model formats, and symbols. docs/operations.md lists what is left.
set -eu
site=$(echo /opt/venv/lib/python3*/site-packages)
# torch needs some of these packages to compile models; the image has no compiler.
PYTHONPATH=pip.whl python -m pip uninstall --quiet --yes \
    openvino-telemetry networkx sympy mpmath setuptools || true
cd "$site"
[ ! -d torch ] || find torch/bin -type f ! -name torch_shm_manager -delete
rm -rf numpy/tests numpy/*/tests scipy/*/tests pandas/tests pyarrow/tests pyarrow/include \
    torch/include torch/test torch/_inductor torch/share \
    openvino/include openvino/tools openvino/libs/cache.json \
    openvino/libs/libopenvino_intel_gpu_plugin.so openvino/libs/libopenvino_intel_npu_plugin.so
for format in tensorflow pytorch paddle gguf tensorflow_lite jax; do
    rm -f openvino/libs/libopenvino_${format}_frontend.so*
done
for library in torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so; do
    [ ! -f "$library" ] || strip --strip-unneeded "$library"
done
[ ! -d torch ] || /opt/venv/bin/python -c "import torch; torch.nn.Conv2d(1, 4, 3)(torch.ones(1, 1, 8, 8))"
