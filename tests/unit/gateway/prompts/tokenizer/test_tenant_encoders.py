"""What a tenant sent shows neither in another one's work nor in its time; in its own it does."""

import random
import time
from collections.abc import Callable
from functools import partial

import pytest
from tokenizers import Tokenizer

from gateway.prompts.tokenizer import encoder as encoders
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.prompts.tokenizer.tenant_encoders import TENANTS_KEPT_MAX, TenantEncoders, freeze_words
from tests.unit.gateway.prompts.tiny_model import make_model
from tests.unit.gateway.prompts.tokenizer.tokenizer_kinds import tokenizer_of

VICTIM, PROBER = "salt of a", "salt of b"
BATCH = 10
"""So many texts lie between a text and its probe, lest the processor's own caches tell of it."""
Cost = Callable[[Callable[[], object]], float]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> TokenService:
    model = make_model(tmp_path_factory.mktemp("model"), tokenizer=tokenizer_of("Llama 3"))
    made = TokenService(TokenizerSource(str(model)), tenants=2)
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


def test_one_tenant_alone_has_all_of_the_bytes() -> None:
    asked: list[tuple[int, int]] = []
    alone = TenantEncoders(lambda *sizes: asked.append(sizes), 1, 1000, 500)  # type: ignore[arg-type, return-value]
    assert asked == [(1000, 500)]
    assert alone.of("") is alone.of("anybody")


def test_tenants_share_the_bytes_and_the_one_away_for_longest_begins_anew() -> None:
    asked: list[tuple[int, int]] = []

    def make(*sizes: int) -> object:
        asked.append(sizes)  # type: ignore[arg-type]
        return object()

    many = TenantEncoders(make, 1000, 1600, 800)  # type: ignore[arg-type]
    first = many.of("0")
    kept = [many.of(str(number)) for number in range(TENANTS_KEPT_MAX)]
    assert kept[0] is first is many.of("0")
    assert set(asked) == {(1600 // TENANTS_KEPT_MAX, 800 // TENANTS_KEPT_MAX)}
    many.of("one more")
    assert many.of("0") is first
    assert many.of("1") is not kept[1]
