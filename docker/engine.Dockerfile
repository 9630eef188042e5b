# syntax=docker/dockerfile:1
# The engine host: the supervisor and its vLLM replicas. Build from the repository's root, one target a kind of machine:
#   docker build -f docker/engine.Dockerfile --target cpu -t peerkv-engine:cpu .
#   docker build -f docker/engine.Dockerfile --target gpu -t peerkv-engine:gpu .
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7
ARG VLLM_IMAGE=vllm/vllm-openai:v0.33.0

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python docker/requirements.py pyproject.toml cpu > /requirements.txt

FROM ${PYTHON_IMAGE} AS build-cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv --without-pip /opt/peerkv
# Where pip finds torch's CPU build: an index, or (PIP_FIND_LINKS) a directory that is mounted while the image is built.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_FIND_LINKS
RUN pip --python /opt/peerkv/bin/python install torch==2.13.0+cpu
# The dependencies are a layer of their own, kept as long as they stay the same.
COPY --from=wheel /requirements.txt /requirements.txt
# What comes as a CUDA build beside a CPU torch is removed in the same layer: vLLM could not be imported with it.
RUN pip --python /opt/peerkv/bin/python install -r /requirements.txt \
    && pip --python /opt/peerkv/bin/python uninstall --yes torchvision torchaudio torchcodec

FROM ${PYTHON_IMAGE} AS cpu
# vLLM's CPU kernels are linked against libnuma; DL3008: Debian's archive keeps one version of it at a time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin peerkv \
    && install -d -o peerkv -g peerkv -m 0700 /run/peerkv /var/log/peerkv /var/cache/peerkv /models
ENV PATH=/opt/peerkv/bin:$PATH PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/models XDG_CONFIG_HOME=/models/config
COPY --from=build-cpu /opt/peerkv /opt/peerkv
COPY --from=wheel /wheels /opt/dist
RUN pip --python /opt/peerkv/bin/python install --no-cache-dir --no-deps --no-index /opt/dist/peerkv-*.whl
COPY docker/healthcheck.py /opt/peerkv/healthcheck.py
USER 10001:10001
WORKDIR /home/peerkv
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "/opt/peerkv/healthcheck.py", "engine"]
ENTRYPOINT ["peerkv"]
CMD ["engine"]
# Last, so that a new revision costs no other layer.
ARG REVISION=unknown
LABEL org.opencontainers.image.title="peerkv engine, CPU" \
      org.opencontainers.image.description="vLLM replicas that import each other's KV cache, for peerkv's gateway" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"

# vLLM's own image has the compiled kernels, and the compilers that Triton and FlashInfer call while they run.
FROM ${VLLM_IMAGE} AS gpu
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin peerkv \
    && install -d -o peerkv -g peerkv -m 0700 /run/peerkv /var/log/peerkv /var/cache/peerkv /models
# All that is compiled while it runs goes where it stays, and where a read-only root lets it.
ENV PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/models XDG_CONFIG_HOME=/models/config \
    TRITON_CACHE_DIR=/models/triton FLASHINFER_WORKSPACE_BASE=/models/flashinfer CUDA_CACHE_PATH=/models/cuda
# The image holds most of what peerkv and its gpu extra need; pip adds what is missing and leaves vLLM as it is. cuda.bindings
# is what the transport opens peers' memory with; importing it needs no GPU. DL3013: the wheel is the one that was just built.
COPY --from=wheel /wheels /opt/dist
# hadolint ignore=DL3013
RUN wheel="$(echo /opt/dist/peerkv-*.whl)" \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir "${wheel}[gpu]" \
    && python3 -c "import importlib.metadata as m; assert m.version('vllm').split('+')[0] == '0.33.0'" \
    && python3 -c "from cuda.bindings import driver, runtime; import msgspec, tokenizers, triton, xxhash"
COPY docker/healthcheck.py /opt/peerkv/healthcheck.py
USER 10001:10001
WORKDIR /home/peerkv
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "/opt/peerkv/healthcheck.py", "engine"]
ENTRYPOINT ["peerkv"]
CMD ["engine"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="peerkv engine, GPU" \
      org.opencontainers.image.description="vLLM replicas that import each other's KV cache, for peerkv's gateway" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
