#!/bin/sh
# Take out of /opt/venv what serving cannot reach: installers, tests, headers, other devices' plugins,
# readers of formats that are not served, and symbols. `docker history` and docs/operations.md say
# what is left.
set -eu
site=$(echo /opt/venv/lib/python3*/site-packages)
# torch's own packages for compiling: without a compiler in the image they are of no use.
/opt/venv/bin/pip uninstall --quiet --yes openvino-telemetry networkx sympy mpmath setuptools pip || true
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
