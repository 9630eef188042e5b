"""The keys file: what may be in it, who may read it, and that it is replaced whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.tenants.key_file import FILE_BYTES_MAX, KeyFileError, locked, read_keys, readable_by_others, write_keys
from gateway.tenants.keys import TOKEN_PREFIX, Key, digest_of, new_token, no_keys

DIGEST = "ab" * 32
SECRET = f'salt_secret = "{"cd" * 32}"\n'


def entry(**values: object) -> str:
    return "[[keys]]\n" + "".join(f"{name} = {value}\n" for name, value in {"name": '"a"', **values}.items())


def test_a_key_is_256_random_bits_of_which_the_file_has_the_digest(tmp_path: Path) -> None:
    token = new_token()
    assert token.startswith(TOKEN_PREFIX)
    assert len(token) - len(TOKEN_PREFIX) == 43
    assert new_token() != token
    path = tmp_path / "keys.toml"
    write_keys(path, no_keys().with_key(Key(name="a", tenant="a", sha256=digest_of(token.encode()).hex())))
    assert token[len(TOKEN_PREFIX) :] not in path.read_text()
    assert read_keys(path).keys[0].sha256 == digest_of(token.encode()).hex()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    moment = datetime(2027, 1, 31, 12, tzinfo=UTC)
    keys = no_keys().with_key(Key(name="a", tenant="team@b", sha256=DIGEST))
    keys = keys.with_key(
        Key(name="b", tenant="b", sha256="cd" * 32, former_sha256="ef" * 32, former_expires=moment, expires=moment)
    )
    write_keys(tmp_path / "keys.toml", keys)
    assert read_keys(tmp_path / "keys.toml") == keys


def test_it_is_its_owners_alone_whatever_it_was_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "there" / "keys.toml"
    write_keys(path, no_keys())
    path.chmod(0o644)
    assert readable_by_others(path)
    write_keys(path, no_keys())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not readable_by_others(path)
    assert os.listdir(path.parent) == ["keys.toml"]


def test_a_link_stays_one_and_its_target_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real.toml", tmp_path / "keys.toml"
    write_keys(real, no_keys())
    link.symlink_to(real)
    keys = no_keys()
    write_keys(link, keys)
    assert link.is_symlink()
    assert read_keys(real) == keys


def test_dates_and_times_without_an_offset_are_in_utc(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(SECRET + entry(sha256=f'"{DIGEST}"', expires="2027-01-31", created="2026-01-01T12:00:00"))
    [key] = read_keys(path).keys
    assert key.expires == datetime(2027, 1, 31, tzinfo=UTC)
    assert key.created == datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert key.tenant == "a"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not toml", "is not TOML"),
        ("n = " + 5000 * "9", "is not TOML"),
        ("n = " + 5000 * "[", "is not TOML"),
        ("", "salt_secret"),
        (SECRET + entry(sha256='"abc"'), "[[keys]] number 1 ('a'): sha256: "),
        (SECRET + entry(sha256=f'"{DIGEST}"', colour='"red"'), "[[keys]] number 1 ('a'): unknown key 'colour'"),
        (SECRET + entry(sha256=f'"{DIGEST}"', tennant='"t"'), "unknown key 'tennant'; did you mean 'tenant'?"),
        (SECRET + entry(sha256=f'"{DIGEST}"', salt_secret='"s"'), "'salt_secret' belongs before the first [[…]]"),
        (SECRET + entry(name='"a"'), "[[keys]] number 1 ('a'): the key 'sha256' is missing"),
        (SECRET + 'tenant = "t"', "unknown key 'tenant': it belongs into a table [[keys]]"),
        (SECRET + "[[kyes]]", "unknown key 'kyes'; did you mean 'keys'?"),
        (SECRET + "[keys]", "keys: write [[keys]], with two brackets"),
        (SECRET + entry(sha256=f'"{DIGEST}"', tenant='"admin"'), "[[keys]] number 1 ('a'): tenant: "),
        (SECRET + entry(sha256=f'"{DIGEST}"', name='"a b"'), "[[keys]] number 1 ('a b'): name: "),
        (SECRET + 2 * entry(sha256=f'"{DIGEST}"'), "same name"),
        (SECRET + entry(sha256=f'"{DIGEST}"') + entry(name='"b"', sha256=f'"{DIGEST}"'), "same sha256"),
    ],
)
def test_what_is_wrong_is_named_without_what_the_file_holds(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(KeyFileError) as refused:
        read_keys(path)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)
    assert DIGEST not in str(refused.value)


NUMBER = "must be a whole number from 1 to 9007199254740992"
DATE = "must be a date, or a date and a time, such as 2027-01-31 or 2027-01-31T12:00:00Z"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n_max": "0"}, f"n_max: {NUMBER}, not 0"),
        ({"n_max": "1.5"}, f"n_max: {NUMBER}, not 1.5"),
        ({"n_max": '"s3cret"'}, f"n_max: {NUMBER}"),
        ({"n_max": "1e300"}, f"n_max: {NUMBER}, not 1e+300"),
        ({"priority": '"s3cret"'}, "priority: must be 'high', 'normal' or 'low'"),
        ({"accepts_loss": "3"}, "accepts_loss: must be true or false, not 3"),
        ({"accepts_loss": '"s3cret"'}, "accepts_loss: must be true or false"),
        ({"expires": '"s3cret"'}, f"expires: {DATE}"),
        ({"expires": "12:00:00"}, f"expires: {DATE}"),
        ({"models": '"s3cret"'}, "models: must be a list"),
        ({"models": "[3]"}, "models.0: must be a text"),
        ({"group": "3"}, "group: must be a text"),
        ({"sha256": '"s3cret"'}, "sha256: must be 64 of the digits 0-9 and a-f"),
    ],
)
def test_what_a_value_must_be_is_said_plainly_and_no_text_is_shown(tmp_path: Path, given: dict[str, str], words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(SECRET + entry(**{"sha256": f'"{DIGEST}"'} | given))
    with pytest.raises(KeyFileError) as refused:
        read_keys(path)
    assert str(refused.value) == f"the keys file {path} is wrong: [[keys]] number 1 ('a'): {words}"


def test_what_stands_before_the_keys_and_a_key_without_a_name_are_told_in_plain_words(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    for content, words in (
        ("", "the key 'salt_secret' is missing"),
        ('salt_secret = "s3cret"', "salt_secret: must be 64 of the digits 0-9 and a-f"),
        ("salt_secret = 3", "salt_secret: must be a text"),
        (SECRET + f'[[keys]]\nsha256 = "{DIGEST}"', "[[keys]] number 1: the key 'name' is missing"),
        (SECRET + "keys = [3]", "[[keys]] number 1: must be a table"),
    ):
        path.write_text(content)
        with pytest.raises(KeyFileError) as refused:
            read_keys(path)
        assert str(refused.value) == f"the keys file {path} is wrong: {words}"


def test_a_file_that_is_not_there_says_how_one_is_made(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="peerkv keys add NAME --keys-file"):
        read_keys(tmp_path / "keys.toml")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with path.open("wb") as file:
        file.truncate(FILE_BYTES_MAX + 1)
    with pytest.raises(KeyFileError, match="more than"):
        read_keys(path)


def test_commands_that_run_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"

    def add(number: int) -> None:
        with locked(path) as keys:
            write_keys(path, keys.with_key(Key(name=f"k{number}", tenant="t", sha256=f"{number:064x}")))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path).keys} == {f"k{number}" for number in range(16)}
