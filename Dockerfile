# Three images from one file: registry (MLflow server, puller, command line; no torch), service (no
# MLflow) and trainer. The stages are in this order because older builders build every stage before
# the target.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    GIT_PYTHON_REFRESH=quiet \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    CONVOY_HOME=/var/lib/convoy
RUN python -m venv /opt/venv \
    && useradd --uid 10001 --no-create-home --home-dir /var/lib/convoy convoy \
    && install -d -o convoy -g convoy \
        /var/lib/convoy /var/lib/convoy/models /var/lib/convoy/plans /artifacts
WORKDIR /app
COPY constraints.txt ./

FROM base AS registry
RUN pip install -c constraints.txt \
    flask gunicorn jinja2 mlflow psycopg2-binary msgspec numpy pillow safetensors requests scipy \
    sqlalchemy
COPY registry/ registry/
USER 10001
CMD ["python", "-m", "registry", "pull", "--watch"]

FROM base AS torch
# PyTorch's index of CPU builds saves gigabytes; empty takes the ordinary one, with CUDA.
ARG TORCH_INDEX_URL=
RUN pip install -c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url ${TORCH_INDEX_URL}} torch \
    && pip install -c constraints.txt msgspec numpy pillow safetensors \
        nncf onnx onnxruntime onnxscript openvino

FROM torch AS service
RUN pip install -c constraints.txt flask gunicorn multipart prometheus-client redis structlog
COPY registry/ registry/
COPY service/ service/
USER 10001
ENV CONVOY_HOST=0.0.0.0
EXPOSE 8080
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=2)"]
CMD ["python", "-m", "service", "--no-pull"]

FROM torch AS trainer
RUN pip install -c constraints.txt \
    matplotlib mlflow psycopg2-binary requests scikit-learn scipy sqlalchemy tqdm
COPY registry/ registry/
COPY training/ training/
USER 10001
ENTRYPOINT ["python", "-m", "training"]
