# The image that every step of the pipeline runs in; docs/images.md says how to build and run it.
#
#     docker build -f docker/stage.Dockerfile -t filterpress-python:0.1.0 .
#
# torch comes with CUDA from PyPI. For steps without a GPU a far smaller image is enough: point the
# build argument PIP_EXTRA_INDEX_URL at an index of CPU builds.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS wheel
COPY constraints.txt /wheels/
ENV PIP_CONSTRAINT=/wheels/constraints.txt
WORKDIR /source
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE}
COPY --from=wheel /wheels /wheels
ARG PIP_EXTRA_INDEX_URL=""
# Of kfp a step needs only the executor, which has no dependencies of its own. What is there to build
# with goes, torch's headers and tests too (145 MB); setuptools stays, for torch asks for it.
RUN pip install --no-cache-dir -c /wheels/constraints.txt \
        "$(echo /wheels/filterpress-*.whl)[train,publish]" \
    && pip install --no-cache-dir --no-deps -c /wheels/constraints.txt kfp \
    && pip uninstall --yes pip wheel \
    && rm -rf /usr/local/lib/python3*/site-packages/torch/include \
        /usr/local/lib/python3*/site-packages/torch/test \
    && useradd --uid 1000 --create-home filterpress
USER 1000
# Nothing but /tmp and the folder of the run is written. Clusters may choose another user, who has no
# home to write compiled code to.
ENV NUMBA_CACHE_DIR=/tmp/numba PYTHONUNBUFFERED=1
WORKDIR /tmp
LABEL org.opencontainers.image.title="filterpress-python" \
    org.opencontainers.image.description="The steps of the filterpress pipeline" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="0.1.0"
