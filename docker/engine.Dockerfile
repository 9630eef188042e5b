# syntax=docker/dockerfile:1
# The engine host: the supervisor and its vLLM replicas. Build from the repository's root, one target a kind of machine:
#   docker build -f docker/engine.Dockerfile --target cpu -t peerkv-engine:cpu .
#   docker build -f docker/engine.Dockerfile --target gpu -t peerkv-engine:gpu .
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.33.0

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS build-cpu
WORKDIR /src
ENV PATH=/opt/peerkv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/peerkv \
    && pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
COPY pyproject.toml docker/requirements.py ./
# What comes as a CUDA build beside a CPU torch is removed in the same layer: vLLM could not be imported with it.
RUN python requirements.py pyproject.toml cpu > requirements.txt \
    && pip install -r requirements.txt \
    && pip uninstall --yes torchvision torchaudio torchcodec

FROM ${PYTHON_IMAGE} AS cpu
# vLLM's CPU kernels are linked against libnuma; DL3008: Debian's archive keeps one version of it at a time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin peerkv \
    && install -d -o peerkv -g peerkv -m 0700 /run/peerkv /var/log/peerkv /models
ENV PATH=/opt/peerkv/bin:$PATH PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/models
COPY --from=build-cpu /opt/peerkv /opt/peerkv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
COPY docker/healthcheck.py /opt/peerkv/healthcheck.py
USER 10001:10001
WORKDIR /home/peerkv
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "/opt/peerkv/healthcheck.py", "engine"]
ENTRYPOINT ["peerkv"]
CMD ["engine"]

# vLLM's own image has the compiled kernels, and the compilers that Triton and FlashInfer call while they run.
FROM ${VLLM_IMAGE} AS gpu
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin peerkv \
    && install -d -o peerkv -g peerkv -m 0700 /run/peerkv /var/log/peerkv /models
ENV PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/models TRITON_CACHE_DIR=/models/triton
# The image holds most of what peerkv and its gpu extra need; pip adds what is missing and leaves vLLM as it is. cuda.bindings
# is what the transport opens peers' memory with; importing it needs no GPU.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    wheel="$(echo /wheels/peerkv-*.whl)" \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir "${wheel}[gpu]" \
    && python3 -c "import importlib.metadata as m; assert m.version('vllm').startswith('0.33')" \
    && python3 -c "from cuda.bindings import driver, runtime; import msgspec, tokenizers, triton, xxhash"
COPY docker/healthcheck.py /opt/peerkv/healthcheck.py
USER 10001:10001
WORKDIR /home/peerkv
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "/opt/peerkv/healthcheck.py", "engine"]
ENTRYPOINT ["peerkv"]
CMD ["engine"]
