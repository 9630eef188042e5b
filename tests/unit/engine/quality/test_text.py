"""Real text: only the articles that figures were published with, without their markup."""

import zipfile

import pytest

from engine.quality import text
from engine.quality.errors import QualityNotMeasured
from engine.quality.markup import plain_text


def test_markup_goes_and_running_text_stays():
    page = (
        "{{Infobox|a={{b|c}}}}\n'''Steam''' is [[water]] in the [[gas|gas phase]]<ref name=x>{{cite}}</ref>, which is"
        " &nbsp;seen as a cloud over [http://example.org kettles] and engines.\n== History ==\n* a list\n{|\n| table\n|}\n"
        "[[File:a.png|thumb|of [[steam]]]]It drove the pumps of mines from 1712 on, and"
        " locomotives a century after that, all over the world.\n"
    )
    assert plain_text(page).split("\n\n") == [
        "Steam is water in the gas phase, which is seen as a cloud over kettles and engines.",
        "It drove the pumps of mines from 1712 on, and locomotives a century after that, all over the world.",
    ]


def test_a_package_with_other_articles_is_refused(tmp_path):
    wheel = tmp_path / "gensim.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(text.MEMBER, b"other")
    with pytest.raises(QualityNotMeasured, match=r"other articles.*--text"):
        text._member(wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("elsewhere", b"")
    with pytest.raises(QualityNotMeasured, match="does not hold"):
        text._member(wheel)


def test_without_pip_one_is_told_to_give_texts(monkeypatch, tmp_path):
    monkeypatch.setenv("PEERKV_CACHE", str(tmp_path))
    monkeypatch.setattr(text, "find_pip", lambda: None)
    with pytest.raises(QualityNotMeasured, match="--text FILE"):
        text.articles()


def test_files_are_read_and_those_that_cannot_be_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert text.files([tmp_path / "a.txt"]) == ["one"]
    with pytest.raises(QualityNotMeasured, match=r"b\.txt"):
        text.files([tmp_path / "b.txt"])
