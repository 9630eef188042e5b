"""The book of kept prefixes."""

import pytest

from gateway.kept_prefixes.book import (
    RENEW_SECONDS_MIN,
    KeptPrefix,
    KeptPrefixBook,
    PlaceState,
    PrefixPlace,
    TooManyPrefixes,
    UnknownPrefix,
)
from gateway.token_ids import TokenIds


def add(book: KeptPrefixBook, tokens: int = 10, *, ttl: float = 100.0, renew: bool = False, now: float = 0.0) -> KeptPrefix:
    ids = TokenIds.of(range(tokens))
    return book.add(ids, tenant="t", model="", replicas=1, ttl=ttl, pin=True, renew=renew, block_size=4, now=now)


def test_a_prefix_is_known_by_its_id_until_its_time_is_over() -> None:
    book = KeptPrefixBook(10, 1000)
    kept = add(book)
    assert book.get(kept.id, 99.0) is kept
    assert kept in book
    with pytest.raises(UnknownPrefix):
        book.get(kept.id, 100.0)
    assert book.all(100.0) == []


def test_ids_are_not_to_be_guessed_and_fit_into_a_hint() -> None:
    book = KeptPrefixBook(100, 1000)
    numbers = {add(book, 1).number for _ in range(100)}
    assert len(numbers) == 100
    assert all(0 < number < 2**63 for number in numbers)


def test_prefixes_and_their_tokens_are_bounded_and_those_that_are_over_make_room() -> None:
    book = KeptPrefixBook(2, 100)
    add(book, 60)
    with pytest.raises(TooManyPrefixes, match="100 tokens"):
        add(book, 41)
    add(book, 40)
    with pytest.raises(TooManyPrefixes, match="2 prefixes"):
        add(book, 0)
    assert book.tokens == 100
    add(book, 100, now=100.0)
    assert len(book) == 1


def test_a_removed_prefix_is_gone() -> None:
    book = KeptPrefixBook(10, 1000)
    kept = add(book)
    assert book.remove(kept.id, 1.0) is kept
    assert kept not in book
    with pytest.raises(UnknownPrefix):
        book.remove(kept.id, 1.0)


def test_only_what_is_to_be_renewed_is_due_and_not_at_once_again() -> None:
    book = KeptPrefixBook(10, 1000)
    add(book)
    kept = add(book, renew=True)
    assert book.due(79.0) == []
    assert book.due(80.0) == [kept]
    assert book.due(80.0 + RENEW_SECONDS_MIN / 2) == []
    assert book.due(80.0 + RENEW_SECONDS_MIN) == [kept]
    book.renewed(kept, 90.0)
    assert kept.expires == 190.0
    assert book.due(160.0) == []
    assert book.due(170.0) == [kept]


def test_what_is_to_be_renewed_stays_though_its_time_is_over() -> None:
    book = KeptPrefixBook(10, 1000)
    kept = add(book, renew=True)
    assert book.due(1000.0) == [kept]


def test_a_restarted_replica_kept_nothing_and_what_is_renewed_is_due_at_once() -> None:
    book = KeptPrefixBook(10, 1000)
    once, renewed, elsewhere = add(book), add(book, renew=True), add(book, renew=True)
    for kept in (once, renewed):
        book.place(kept, PrefixPlace("a", PlaceState.PINNED))
    book.place(elsewhere, PrefixPlace("b", PlaceState.PINNED))
    book.lost("a", "restarted")
    assert [place.state for kept in (once, renewed) for place in kept.places] == [PlaceState.FAILED] * 2
    assert [place.state for place in elsewhere.places] == [PlaceState.PINNED]
    assert book.due(1.0) == [renewed]
