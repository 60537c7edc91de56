# Four images from one file:
# - registry: MLflow server, puller, control plane and command line. It has OpenVINO, so that the gate
#   times versions as workers will serve them, and no torch.
# - service: OpenVINO, and neither torch nor MLflow.
# - trainer. It also has the client, so that `convoy classify` can ask a service.
# - service-torch: for GPUs, and for networks that only torch can run.
# The images of the service copy their packages from a build stage, which is not part of the image.
# The others install theirs, because copying a gigabyte takes a third of the time of installing it.
# The stages are in this order because older builders build every stage before the target. To build
# on exactly the same base again, set PYTHON_IMAGE in .env to a digest (SECURITY.md).
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    GIT_PYTHON_REFRESH=quiet \
    CONVOY_HOME=/var/lib/convoy
RUN useradd --uid 10001 --no-create-home --home-dir /var/lib/convoy convoy \
    && install -d -o convoy -g convoy /artifacts /var/lib/convoy \
        /var/lib/convoy/models /var/lib/convoy/plans /var/lib/convoy/tokens \
    && printf '#!/bin/sh\nexec python -m convoy "$@"\n' >/usr/local/bin/convoy \
    && chmod 755 /usr/local/bin/convoy
WORKDIR /app
STOPSIGNAL SIGTERM
LABEL org.opencontainers.image.title="Convoy" \
    org.opencontainers.image.licenses="Apache-2.0"
# Programs get their secrets from files: NAME_FILE is the path of the file that holds NAME.
ENTRYPOINT ["python", "-m", "registry.cli.secret_files"]

FROM base AS packages
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY pyproject.toml constraints.txt deploy/requirements.py deploy/hashes.txt deploy/prune.sh ./
COPY clients/python/pyproject.toml clients/python/
# The pip of the base image cannot read hashes from a constraints file. This one runs from its
# archive, so that /opt/venv never has an installer.
RUN python -m venv --without-pip /opt/venv \
    && grep '^pip==' hashes.txt >pip.txt && pip download --no-deps --require-hashes -r pip.txt \
    && mv pip-*.whl pip.whl

FROM packages AS server-packages
RUN python requirements.py server s3 >wanted \
    && PYTHONPATH=pip.whl python -m pip install --require-hashes -c hashes.txt -r wanted \
    && sh prune.sh

FROM server-packages AS registry
RUN python requirements.py openvino >wanted \
    && PYTHONPATH=pip.whl python -m pip install --require-hashes -c hashes.txt -r wanted \
    && sh prune.sh && rm -rf /build
WORKDIR /app
COPY deploy/mlflow-auth.ini /etc/convoy/
COPY pyproject.toml ./
COPY convoy/ convoy/
COPY registry/ registry/
USER 10001
CMD ["python", "-m", "registry", "pull", "--watch"]

FROM base AS served
USER 10001
ENV CONVOY_HOST=0.0.0.0
EXPOSE 8080
# Patient, because Swarm kills a replica that fails it, and each check starts Python, which may take
# seconds where all CPUs are busy. The proxy has a check of its own.
HEALTHCHECK --interval=5s --timeout=15s --retries=6 --start-period=120s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=10)"]
CMD ["python", "-m", "service", "--no-pull"]

FROM packages AS service-packages
RUN python requirements.py service grpc signing tracing openvino >wanted \
    && PYTHONPATH=pip.whl python -m pip install --require-hashes -c hashes.txt -r wanted
RUN sh prune.sh

FROM served AS service
COPY --from=service-packages /opt/venv /opt/venv
COPY pyproject.toml ./
COPY convoy/ convoy/
COPY registry/ registry/
COPY service/ service/

FROM server-packages AS trainer
# torch is installed last and without hashes, because each index has its own builds of a version.
ARG TORCH_INDEX_URL=
RUN python requirements.py training server | grep -v '^torch' >wanted \
    && PYTHONPATH=pip.whl python -m pip install --require-hashes -c hashes.txt -r wanted \
    && python requirements.py torch >wanted \
    && PYTHONPATH=pip.whl python -m pip install -c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url ${TORCH_INDEX_URL}} -r wanted \
    && rm -rf /build
WORKDIR /app
COPY pyproject.toml ./
COPY convoy/ convoy/
COPY registry/ registry/
COPY training/ training/
COPY clients/python/convoy_client/ convoy_client/
USER 10001
CMD ["python", "-m", "training"]

FROM packages AS torch-packages
# PyTorch's index of CPU builds saves gigabytes. If this is empty, the image gets the CUDA build.
ARG TORCH_INDEX_URL=
RUN apt-get update && apt-get install -y --no-install-recommends binutils
RUN python requirements.py service grpc signing tracing >wanted \
    && PYTHONPATH=pip.whl python -m pip install --require-hashes -c hashes.txt -r wanted \
    && python requirements.py torch >wanted \
    && PYTHONPATH=pip.whl python -m pip install -c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url ${TORCH_INDEX_URL}} -r wanted
RUN sh prune.sh

FROM served AS service-torch
COPY --from=torch-packages /opt/venv /opt/venv
COPY pyproject.toml ./
COPY convoy/ convoy/
COPY registry/ registry/
COPY service/ service/
