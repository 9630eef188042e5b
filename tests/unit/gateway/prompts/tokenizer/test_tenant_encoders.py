"""What a tenant sent shows neither in another one's work nor in its time; in its own it does."""

import random
import time
from collections.abc import Callable
from functools import partial

import pytest
from tokenizers import Tokenizer

from gateway.prompts.tokenizer import encoder as encoders
from gateway.prompts.tokenizer.encoder import Encoder
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.prompts.tokenizer.tenant_encoders import TENANTS_KEPT_MAX, TenantEncoders, freeze_words
from tests.unit.gateway.prompts.tiny_model import make_model
from tests.unit.gateway.prompts.tokenizer.tokenizer_kinds import tokenizer_of
from transport.table.quality import lossy_salt

VICTIM, PROBER = "salt of a", "salt of b"
BATCH = 10
"""So many texts lie between a text and its probe, lest the processor's own caches tell of it."""
Cost = Callable[[Callable[[], object]], float]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Sizes:
    """Makes stand-ins for encoders; `made` are the bytes that each was given."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []

    def __call__(self, ids: int, texts: int) -> Encoder:
        self.made.append((ids, texts))
        return object()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> TokenService:
    model = make_model(tmp_path_factory.mktemp("model"), tokenizer=tokenizer_of("Llama 3"))
    made = TokenService(TokenizerSource(str(model)), tenants=lambda: 2)
    assert made.load().loaded
    return made


@pytest.fixture(autouse=True)
def _in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def text_of(source: random.Random, characters: int, letters: tuple[int, int] = (3, 9)) -> str:
    """A text of random words of so many letters."""
    words = ["".join(source.choices(LETTERS, k=source.randint(*letters))) for _ in range(characters // letters[0] + 1)]
    lines = [" ".join(words[start : start + 12]) for start in range(0, len(words), 12)]
    return "\n".join(lines)[:characters]


def area(seen: list[float], unseen: list[float]) -> float:
    """The area under the curve of who takes less for having been seen: 0.5 is a guess, 1 is certain."""
    wins = sum((first < second) + (first == second) / 2 for first in seen for second in unseen)
    return wins / (len(seen) * len(unseen))


def probed(
    send: Callable[[str], object],
    probe: Callable[[str], object],
    characters: int,
    trials: int,
    cost: Cost,
    letters: tuple[int, int] = (3, 9),
    between: int = 0,
) -> float:
    """The area, where half of the texts that are probed were sent before, among others that lie as far back.

    Before each probe, `between` other texts are probed, whose cost is not counted.
    """
    source = random.Random(7)
    costs: dict[bool, list[float]] = {True: [], False: []}
    while len(costs[True]) < trials:
        texts = [text_of(source, characters, letters) for _ in range(2 * min(BATCH, trials))]
        for place, text in enumerate(texts):
            send(text if place % 2 == 0 else text_of(source, characters, letters))
        for place in source.sample(range(len(texts)), len(texts)):
            for _ in range(between):
                probe(text_of(source, characters, letters))
            costs[place % 2 == 0].append(cost(partial(probe, texts[place])))
    return area(costs[True], costs[False])


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Cost:
    """Counts the characters that are tokenised, and not looked up, in a call."""
    counted = 0
    encode_all = encoders.encode_all

    def counting(tokenizer: object, texts: list[str], special: bool) -> object:
        nonlocal counted
        counted += sum(map(len, texts))
        return encode_all(tokenizer, texts, special)  # type: ignore[arg-type]

    def cost(call: Callable[[], object]) -> float:
        before = counted
        call()
        return counted - before

    monkeypatch.setattr(encoders, "encode_all", counting)
    return cost


def cpu_seconds(call: Callable[[], object]) -> float:
    before = time.thread_time_ns()
    call()
    return float(time.thread_time_ns() - before)


def between(service: TokenService, sender: str, prober: str) -> tuple[Callable[[str], object], Callable[[str], object]]:
    return lambda text: service.encode(text, tenant=sender), lambda text: service.encode(text, tenant=prober)


@pytest.mark.parametrize(("characters", "trials"), [(200, 100), (1_000, 100), (20_000, 20), (100_000, 5)])
def test_what_another_tenant_sent_is_tokenised_anew(service: TokenService, work: Cost, characters: int, trials: int) -> None:
    # Words may have been met before in the prober's own texts, so that some less is new in one than in another.
    margin = 0.08 if trials >= 100 else 0.3
    assert abs(probed(*between(service, VICTIM, PROBER), characters, trials, work) - 0.5) <= margin
    assert probed(*between(service, VICTIM, VICTIM), characters, trials, work) > 0.9


def test_the_time_says_nothing_of_another_tenants_texts(service: TokenService) -> None:
    trials = 400  # 0.08 are four standard deviations of a guess then
    assert abs(probed(*between(service, VICTIM, PROBER), 1_000, trials, cpu_seconds, between=8) - 0.5) <= 0.08


def test_the_time_says_much_of_ones_own_texts(service: TokenService) -> None:
    assert probed(*between(service, VICTIM, VICTIM), 1_000, 100, cpu_seconds) > 0.9


@pytest.mark.parametrize("frozen", [True, False])
def test_a_tokenizer_whose_words_are_frozen_remembers_no_others(frozen: bool) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_of("Llama 3").to_str())  # one whose words no other test has filled
    if frozen:
        freeze_words(tokenizer)

    def encode(text: str) -> object:
        return encoders.encode_all(tokenizer, [text], False)

    characters, trials = (1_000, 400) if frozen else (10_000, 30)  # which the tokenizer's own memory of words holds
    # What was encoded a moment ago is in the processor's caches still, which hold nothing for as long as a request takes.
    found = probed(encode, encode, characters, trials, cpu_seconds, letters=(150, 200), between=8 if frozen else 0)
    assert abs(found - 0.5) <= 0.08 if frozen else found > 0.65


def test_a_tenant_alone_has_all_of_the_bytes() -> None:
    sizes = Sizes()
    alone = TenantEncoders(sizes, lambda: 1, 1000, 500)
    first = alone.of("a")
    assert alone.of("a") is first is alone.of(lossy_salt("a"))
    assert alone.of("b") is not first  # who came in the place of a
    assert sizes.made == [(1000, 500)] * 3


def test_where_nobody_needs_a_key_all_have_the_same_encoder() -> None:
    sizes = Sizes()
    everybody = TenantEncoders(sizes, lambda: 0, 1000, 500)
    assert everybody.of("") is everybody.of(lossy_salt(""))
    assert sizes.made == [(1000, 500)]


def test_tenants_share_the_bytes_and_the_one_away_for_longest_begins_anew() -> None:
    sizes = Sizes()
    many = TenantEncoders(sizes, lambda: 1000, 1600, 800)
    first = many.of("0")
    kept = [many.of(str(number)) for number in range(TENANTS_KEPT_MAX)]
    assert kept[0] is first is many.of("0")
    assert set(sizes.made) == {(1600 // TENANTS_KEPT_MAX, 800 // TENANTS_KEPT_MAX)}
    many.of("one more")
    assert many.of("0") is first
    assert many.of("1") is not kept[1]


def test_when_tenants_become_more_than_the_shares_all_begin_anew_with_smaller_ones() -> None:
    sizes, tenants = Sizes(), 1
    shared = TenantEncoders(sizes, lambda: tenants, 1600, 800)
    alone = shared.of("a")
    tenants = 2
    halves = shared.of("a"), shared.of("b")
    assert alone not in halves
    assert sizes.made[-2:] == [(800, 400)] * 2
    tenants = 4
    quarters = shared.of("a"), shared.of("b")
    assert sizes.made[-2:] == [(400, 200)] * 2
    tenants = 3  # one has left: nobody's share says so
    assert (shared.of("a"), shared.of("b")) == quarters


def test_the_gateways_own_texts_take_no_tenants_share() -> None:
    shared = TenantEncoders(Sizes(), lambda: 1, 1000, 500)
    first = shared.of("a")
    assert shared.of("") is not first
    assert shared.of("a") is first


def test_words_are_frozen_before_the_first_tenant_has_an_encoder() -> None:
    frozen, tenants = [], 0

    def freeze() -> None:
        frozen.append(tenants)

    shared = TenantEncoders(Sizes(), lambda: tenants, 1000, 500, freeze)
    before = shared.of("")
    assert not frozen
    tenants = 1
    shared.of("a")
    tenants = 8
    shared.of("a")
    assert frozen == [1]
    assert shared.of("") is not before
