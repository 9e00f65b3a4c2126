# The image of a vehicle: no torch, no pipeline, no publisher.
#
#     docker build -f docker/device.Dockerfile -t filterpress-device:0.1.0 .
#     vehicle() {
#         docker run --rm --read-only --cap-drop all --security-opt no-new-privileges \
#             -v vehicle:/var/lib/vehicle -v "$PWD/root.json:/root.json:ro" --network host \
#             filterpress-device:0.1.0 "$@"
#     }
#     vehicle init /var/lib/vehicle/home --store URL --root /root.json
#     vehicle run /var/lib/vehicle/home
#
# Nothing but the volume is written. The folder of the vehicle lies below it, because `init` makes it
# all at once.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE}
COPY constraints.txt /wheels/
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /wheels/constraints.txt \
        "$(echo /wheels/filterpress-*.whl)[device]" \
    && useradd --uid 1000 --create-home filterpress \
    && install -d -o filterpress /var/lib/vehicle
USER 1000
# Compiled code lasts as long as the volume: without it the first decoding takes seconds each time.
ENV NUMBA_CACHE_DIR=/var/lib/vehicle/numba PYTHONUNBUFFERED=1
ENTRYPOINT ["filterpress-device"]
