# Debian's Prometheus, as prom/prometheus runs it, where that image cannot be pulled.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends prometheus \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o nobody -g nogroup /prometheus
USER 65534:65534
ENTRYPOINT ["prometheus"]
