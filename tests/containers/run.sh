#!/usr/bin/env bash
# `make containers`: builds the images with podman from a clean clone of what is committed, runs them by compose.yaml, and tries
# them out: completions, imports, kills, stops, restarts, Prometheus. Some 20 minutes the first time, 12 GB of disk.
#   WORK=…            where all of it is kept; left out: a new directory, removed at the end
#   PYTHON_IMAGE=…    a base image; left out: python:3.12 where it can be pulled, else one that is made of Debian's packages
#   PIP_FIND_LINKS=…  a directory with wheels for the build, torch's CPU build among them
# Arguments go to pytest. Needs root, and:
#   apt-get install podman runc buildah netavark aardvark-dns iptables catatonit debootstrap prometheus
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

for program in podman runc debootstrap iptables promtool; do
    command -v "$program" >/dev/null || { echo "make containers needs $program; see $0" >&2; exit 1; }
done
if [ -z "${WORK:-}" ]; then
    WORK=$(mktemp -d -t peerkv-containers.XXXXXX)
    trap 'podman unmount --all >/dev/null 2>&1; podman system reset --force >/dev/null 2>&1; rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK"

# A store and networks of its own; what it asks of the machine can be had in a container and without systemd too.
cat >"$WORK/storage.conf" <<EOF
[storage]
driver = "overlay"
graphroot = "$WORK/store"
runroot = "$WORK/run"
EOF
cat >"$WORK/containers.conf" <<EOF
[network]
network_backend = "netavark"
network_config_dir = "$WORK/networks"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
EOF
export CONTAINERS_STORAGE_CONF="$WORK/storage.conf" CONTAINERS_CONF="$WORK/containers.conf"

export PEERKV_CLONE="$WORK/clone"
rm -rf "$PEERKV_CLONE"
git clone --quiet --no-hardlinks . "$PEERKV_CLONE"

stand_in=localhost/python:3.11-slim
if [ -z "${PYTHON_IMAGE:-}" ]; then
    PYTHON_IMAGE=docker.io/library/$(sed -n 's/^ARG PYTHON_IMAGE=//p' docker/gateway.Dockerfile)
    if podman image exists "$stand_in" || ! podman pull --quiet "$PYTHON_IMAGE" >/dev/null 2>&1; then
        PYTHON_IMAGE=$stand_in
        podman image exists "$stand_in" || tests/containers/base-image.sh "$stand_in"
    fi
fi

build=(podman build --format docker --isolation chroot --network host
    --ulimit nofile=1024:1024 --build-arg "PYTHON_IMAGE=$PYTHON_IMAGE" --build-arg "REVISION=$(git rev-parse HEAD)")
if [ -d "${PIP_FIND_LINKS:-}" ]; then
    build+=(--volume "$PIP_FIND_LINKS:$PIP_FIND_LINKS:ro" --build-arg "PIP_FIND_LINKS=$PIP_FIND_LINKS"
        --build-arg PIP_EXTRA_INDEX_URL=)
fi
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
"${build[@]}" -f "$PEERKV_CLONE/docker/gateway.Dockerfile" -t "peerkv-gateway:$version" "$PEERKV_CLONE"
"${build[@]}" -f "$PEERKV_CLONE/docker/engine.Dockerfile" --target cpu -t "peerkv-engine:$version-cpu" "$PEERKV_CLONE"
export PROMETHEUS_IMAGE=localhost/prometheus:debian
"${build[@]}" -f tests/containers/prometheus.Dockerfile -t "$PROMETHEUS_IMAGE" tests/containers
podman images --format 'table {{.Repository}} {{.Tag}} {{.Size}}' | grep -v '<none>'

.venv/bin/python -m pytest tests/containers "$@"
