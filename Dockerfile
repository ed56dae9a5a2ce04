# The image of the server; see deploy/README.md.
#
#   PIP_ARGS      arguments of pip when it installs torch, to choose a build for the CPU or for a version of CUDA
#   BAKE_MODEL    a model (alias or Hugging Face id) to include in the image and serve by default
#   BASE_IMAGE    a Debian or Ubuntu image with Python 3.11 or newer and its venv module
#
# To configure pip for the build only: docker build --secret id=pip,src=pip.conf

ARG PYTHON_VERSION=3.13
ARG BASE_IMAGE=python:${PYTHON_VERSION}-slim-trixie

# The dependencies of the project: rebuilt only when pyproject.toml changes.
FROM ${BASE_IMAGE} AS dependencies
ARG PIP_ARGS=""
ENV PATH=/opt/lightwell/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python3 -m venv /opt/lightwell/venv
COPY pyproject.toml ./
RUN python3 -c 'import tomllib; print(*tomllib.load(open(0, "rb"))["project"]["dependencies"], sep="\n")' \
    < pyproject.toml > requirements.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install ${PIP_ARGS} "$(grep '^torch[^a-z]' requirements.txt)" \
    && pip install --requirement requirements.txt

# The wheel includes the compiled CPU kernels, because the cache folder of the image is a volume, and without Triton
# the image has no compiler.
FROM dependencies AS wheel
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY README.md LICENSE ./
COPY engine engine
RUN test "$(uname -m)" != x86_64 || python3 -m engine.parts.build_kernels.build --all --in-package
COPY server server
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip wheel --no-deps --wheel-dir /dist . \
    && pip install --no-deps --no-index /dist/*.whl

FROM wheel AS model
ARG BAKE_MODEL=""
COPY deploy/bake_model.py ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    LIGHTWELL_CACHE=/opt/lightwell/models/files HF_HOME=/opt/lightwell/models/files/huggingface \
    python3 bake_model.py /opt/lightwell/models "${BAKE_MODEL}"

FROM ${BASE_IMAGE}
ARG REVISION=""
LABEL org.opencontainers.image.title="Lightwell" \
      org.opencontainers.image.description="An OpenAI-compatible LLM inference server whose answers do not depend on the batch" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"

# The server writes caches only: downloaded models, and files that libraries keep in the home folder.
ENV PATH=/opt/lightwell/venv/bin:$PATH \
    HOME=/var/cache/lightwell \
    HF_HOME=/var/cache/lightwell/huggingface \
    LIGHTWELL_CACHE=/var/cache/lightwell \
    LIGHTWELL_CONFIG=/etc/lightwell/config.yaml \
    LIGHTWELL_HOST=0.0.0.0 \
    LIGHTWELL_PORT=8000 \
    PIP_NO_CACHE_DIR=1
RUN groupadd --gid 10001 lightwell \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /var/cache/lightwell \
        --shell /usr/sbin/nologin lightwell \
    && install --directory --owner=lightwell --group=lightwell /var/cache/lightwell

# The layers that change least come first. The model is outside the volume, which would hide it.
COPY --from=dependencies /opt/lightwell/venv /opt/lightwell/venv
# Triton, which torch for CUDA brings, compiles a C module when the server starts. That takes gcc, the headers of libc,
# and Python.h, which the Python of the default base image has. The headers of CUDA and ptxas are in Triton's package;
# libcuda.so.1 comes with the container runtime, and ldconfig, which finds it, with the base image.
RUN if pip show --quiet triton; then \
        header="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
        && apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
            gcc libc6-dev $(test -f "$header" || echo python3-dev) \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=model /opt/lightwell/models /opt/lightwell/models
COPY deploy/healthcheck.py /opt/lightwell/
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-deps --no-index /dist/*.whl \
    && install -D --mode=0644 /opt/lightwell/models/config.yaml /etc/lightwell/config.yaml

USER 10001:10001
WORKDIR /
VOLUME /var/cache/lightwell
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-I", "/opt/lightwell/healthcheck.py"]
ENTRYPOINT ["lightwell", "serve"]
