# syntax=docker/dockerfile:1
# The front door alone: no torch, no vLLM. Build from the repository's root:
#   docker build -f docker/gateway.Dockerfile -t peerkv-gateway .
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
ENV PATH=/opt/peerkv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/peerkv
COPY pyproject.toml docker/requirements.py ./
# The dependencies are a layer of their own, kept while only peerkv changes.
RUN python requirements.py pyproject.toml > requirements.txt && pip install -r requirements.txt
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE}
# The same user in every peerkv image: sockets and block tables are for one uid only.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin peerkv \
    && install -d -o peerkv -g peerkv -m 0700 /run/peerkv /var/log/peerkv /models
ENV PATH=/opt/peerkv/bin:$PATH PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/models
COPY --from=build /opt/peerkv /opt/peerkv
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
COPY docker/healthcheck.py /opt/peerkv/healthcheck.py
USER 10001:10001
WORKDIR /home/peerkv
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "/opt/peerkv/healthcheck.py", "gateway"]
ENTRYPOINT ["peerkv"]
CMD ["gateway", "--host", "0.0.0.0"]
