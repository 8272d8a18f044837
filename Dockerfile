# syntax=docker/dockerfile:1
# Two targets: `cpu` (the default for CI) and `gpu`, which builds engines on the machine that it is started on.
#   docker build --target cpu -t compress:cpu .
#   docker run --rm -v "$PWD:/work" compress:cpu run compress.yaml
#   docker build --target gpu -t compress:gpu .
#   docker run --rm --gpus all -v engines:/engines -v "$PWD/release:/release:ro" -e COMPRESS_ONNX=/release/dense.onnx \
#     compress:gpu sh -c 'echo "$COMPRESS_ENGINE"'
# The first start on a GPU builds the engine; later ones find it in the volume (deploy/first_start.py).
ARG CPU_IMAGE=python:3.12-slim
ARG GPU_IMAGE=nvcr.io/nvidia/tensorrt:26.04-py3

FROM ${CPU_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md ./
COPY compress ./compress
COPY deploy ./deploy
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${CPU_IMAGE} AS cpu
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu /wheels/*.whl \
    && rm -rf /wheels \
    && useradd --create-home --uid 10001 compress
USER compress
WORKDIR /work
ENTRYPOINT ["compress"]
CMD ["--help"]

# TensorRT comes with the image. On a plain CUDA image it is installed:
#   --build-arg GPU_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04 --build-arg EXTRAS=gpu,tensorrt-rtx
FROM ${GPU_IMAGE} AS gpu
ARG EXTRAS=gpu
# The distribution's own packages, of whatever version its image is at.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --system-site-packages /opt/compress
ENV PATH=/opt/compress/bin:${PATH}
COPY --from=wheel /wheels /wheels
RUN wheel="$(ls /wheels/*.whl)" \
    && pip install --no-cache-dir "${wheel}[${EXTRAS}]" \
    && rm -rf /wheels \
    && useradd --create-home --uid 10001 compress \
    && install --directory --owner=compress /engines
USER compress
ENV COMPRESS_ENGINES=/engines
VOLUME ["/engines"]
WORKDIR /work
ENTRYPOINT ["python", "-m", "deploy.first_start"]
CMD ["compress", "--help"]
