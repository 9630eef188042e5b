# syntax=docker/dockerfile:1
# The front door, and the server of `peerkv vault`: no torch, no vLLM. Build from the repository's root:
#   docker build -f docker/gateway.Dockerfile -t peerkv-gateway .
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python docker/requirements.py pyproject.toml vault > /requirements.txt

FROM ${PYTHON_IMAGE} AS build
RUN python -m venv --without-pip /opt/peerkv
# The dependencies are a layer of their own, kept as long as they stay the same.
COPY --from=wheel /requirements.txt /requirements.txt
RUN pip --python /opt/peerkv/bin/python install --no-cache-dir -r /requirements.txt

FROM ${PYTHON_IMAGE}
# The same user in every peerkv image: sockets and block tables are for one uid only.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin peerkv \
    && install -d -o peerkv -g peerkv -m 0700 /run/peerkv /var/log/peerkv /var/lib/peerkv /models
ENV PATH=/opt/peerkv/bin:$PATH PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/models
COPY --from=build /opt/peerkv /opt/peerkv
COPY --from=wheel /wheels /opt/dist
RUN pip --python /opt/peerkv/bin/python install --no-cache-dir --no-deps --no-index /opt/dist/peerkv-*.whl
COPY docker/healthcheck.py /opt/peerkv/healthcheck.py
USER 10001:10001
WORKDIR /home/peerkv
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "/opt/peerkv/healthcheck.py", "gateway"]
ENTRYPOINT ["peerkv"]
CMD ["gateway", "--host", "0.0.0.0"]
# Last, so that a new revision costs no other layer.
ARG REVISION=unknown
LABEL org.opencontainers.image.title="peerkv gateway" \
      org.opencontainers.image.description="An OpenAI-compatible gateway over vLLM replicas that import each other's KV cache" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
