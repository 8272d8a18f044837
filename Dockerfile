# syntax=docker/dockerfile:1
# Two targets: `cpu` (the default for CI) and `gpu` (engines are built on the target machine).
#   docker build --target cpu -t compress:cpu .
#   docker run --rm -v "$PWD:/work" compress:cpu run compress.yaml
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

FROM ${GPU_IMAGE} AS gpu
COPY --from=wheel /wheels /wheels
RUN wheel="$(ls /wheels/*.whl)" \
    && pip install --no-cache-dir "${wheel}[gpu]" \
    && rm -rf /wheels \
    && useradd --create-home --uid 10001 compress
USER compress
WORKDIR /work
ENTRYPOINT ["compress"]
CMD ["--help"]
