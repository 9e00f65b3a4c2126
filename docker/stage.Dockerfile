# The image that every step of the pipeline runs in:
#
#     docker build -f docker/stage.Dockerfile -t filterpress-python:0.1.0 .
#
# torch comes with CUDA from PyPI. For steps without a GPU a far smaller image is enough: point the
# build argument PIP_EXTRA_INDEX_URL at an index of CPU builds.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE}
ARG PIP_EXTRA_INDEX_URL=""
COPY constraints.txt /wheels/
COPY --from=wheel /wheels /wheels
# Of kfp a step needs only the executor, which has no dependencies of its own.
RUN pip install --no-cache-dir -c /wheels/constraints.txt \
        "$(echo /wheels/filterpress-*.whl)[train,publish]" \
    && pip install --no-cache-dir --no-deps -c /wheels/constraints.txt kfp \
    && useradd --uid 1000 --create-home filterpress
USER 1000
# Clusters may choose another user, who has no home to write compiled code to.
ENV NUMBA_CACHE_DIR=/tmp/numba PYTHONUNBUFFERED=1
WORKDIR /tmp
