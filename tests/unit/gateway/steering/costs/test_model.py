"""The cost model: sane before the first request, right after some, and not led astray."""

import random

import pytest
from msgspec.structs import replace

from gateway.steering.costs.model import CostModel, ModelKey, Outcome, PrefillTerms, pairs
from gateway.steering.costs.replica_load import IDLE, ReplicaLoad

GPU, CPU = ModelKey("cuda", "m"), ModelKey("cpu", "m")


def prefill_seconds(costs: CostModel, key: ModelKey, cached: int, new: int, decoding: int = 0) -> float:
    """What computing `new` tokens behind `cached` is expected to take, others being decoded meanwhile."""
    model = costs.model(key)
    return model.computing(cached, cached + new)[0] + model.slowed_seconds(decoding, new)


def terms(costs: CostModel, key: ModelKey) -> PrefillTerms:
    model = costs.model(key)
    return PrefillTerms(model.fixed, model.prompt_token, model.new_token, model.pair, model.decode_step)


@pytest.mark.parametrize(
    ("cached", "new", "measured"),
    [(0, 1024, 0.033), (0, 8192, 0.220), (0, 32_768, 1.222), (1023, 1, 0.024), (8191, 1, 0.031), (32_767, 1, 0.057)],
)
def test_the_first_request_on_a_gpu_is_expected_as_an_h200_takes_for_it(cached: int, new: int, measured: float) -> None:
    assert prefill_seconds(CostModel(), GPU, cached, new) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(
    ("cached", "new", "measured"), [(0, 1000, 1.786), (0, 2000, 4.382), (1000, 26, 0.060), (1984, 16, 0.119)]
)
def test_the_first_request_on_a_cpu_is_expected_as_two_cores_take_for_it(cached: int, new: int, measured: float) -> None:
    assert prefill_seconds(CostModel(), CPU, cached, new) == pytest.approx(measured, rel=0.35)


def test_an_unknown_kind_of_device_and_transport_have_a_prior_too() -> None:
    costs = CostModel()
    assert prefill_seconds(costs, ModelKey("tpu"), 0, 1000) > 0
    assert costs.transfer_seconds("a", "b", "pigeon", 1000) > 0
    assert costs.median_error() is None
    assert costs.report().prefill == ()


def test_nothing_to_import_takes_no_time_and_sharing_takes_more() -> None:
    costs = CostModel()
    assert costs.transfer_seconds("a", "b", "cuda_ipc", 0) == 0
    alone, shared = (costs.transfer_seconds("a", "b", "cuda_ipc", 32_000, sharing=n) for n in (1, 3))
    assert alone < shared < 3 * alone


def test_a_queue_is_the_work_ahead_and_the_decodes_beside_it() -> None:
    costs = CostModel()
    load = ReplicaLoad(tokens=16_000, pairs=pairs(0, 16_000), head_tokens=16_000, head_pairs=pairs(0, 16_000), requests=1)
    assert costs.model(GPU).queue_seconds(IDLE, 0.0) == 0
    waited = costs.model(GPU).queue_seconds(load, 0.0)
    assert waited == pytest.approx(costs.model(GPU).work_seconds(16_000, pairs(0, 16_000)))
    assert costs.model(GPU).queue_seconds(load, 0.1) == pytest.approx(waited - 0.1)
    assert costs.model(GPU).queue_seconds(replace(load, decoding=100), 0.0) > waited


class Machine:
    """An engine and its links as they really are, with noise; plays requests and tells the model."""

    terms = PrefillTerms(0.04, 5e-6, 9e-5, 4e-9, 5e-4)  # four times an H200's, more or less
    import_seconds, bytes_second, token_bytes = 0.02, 20e9, 98_304

    def __init__(self, costs: CostModel, noise: float = 0.1, seed: int = 3) -> None:
        self.costs = costs
        self.rng = random.Random(seed)
        self.noise = noise
        self.slower = 1.0
        self.now = 0.0

    def play(self, count: int, *, reports: bool = True, outliers: float = 0.0) -> None:
        for _ in range(count):
            prompt = self.rng.choice([200, 2000, 8000, 30_000])
            cached = int(prompt * self.rng.choice([0, 0, 0.5, 0.95])) // 16 * 16
            source = "b" if cached and self.rng.random() < 0.5 else None
            ahead = self.rng.choice([0, 0, 0, 4000, 12_000])
            work = pairs(0, ahead)
            load = ReplicaLoad(ahead, work, ahead, work, requests=1, decoding=self.rng.randint(0, 30))
            self.request(prompt, cached, source, load, reports, outliers)

    def request(self, prompt: int, cached: int, source: str | None, load: ReplicaLoad, reports: bool, outliers: float) -> None:
        costs, new = self.costs, prompt - cached
        self.now += 0.5
        load = replace(load, since=self.now)
        queue = costs.model(GPU).queue_seconds(load, self.now)
        transfer = costs.transfer_seconds("a", source, "cuda_ipc", cached, device="cuda") if source else 0.0
        expected = (queue + transfer + prefill_seconds(costs, GPU, cached, new, load.decoding)) * costs.model(
            GPU
        ).slowdown.factor(self.now)
        noise = self.rng.lognormvariate(0, self.noise)
        noise *= self.slower
        imported = (self.import_seconds + cached * self.token_bytes / self.bytes_second) * noise if source else 0.0
        paid = max(0, new - costs.model(GPU).free_tokens)
        features = (1.0, prompt, load.tokens + paid, load.pairs + pairs(prompt - paid, paid))
        took = sum(value * term for value, term in zip(features, self.terms, strict=False))
        took += self.terms.decode_step * load.decoding * (1 + (load.tokens + new) / 8192)
        took = took * self.slower * self.rng.lognormvariate(0, self.noise) + imported
        if self.rng.random() < outliers:
            took *= 30
        costs.observe(
            Outcome(
                GPU, "a", source, "cuda_ipc", load, self.now, prompt, new, cached if source else 0, expected, took,
                imported if source and reports else None, cached * self.token_bytes if source and reports else 0,
            )
        )  # fmt: skip


@pytest.mark.parametrize("source", [None, "b"])
def test_of_a_flood_some_are_learnt_from_but_all_imports(source: str | None) -> None:
    costs = CostModel()
    for place in range(4000):
        load, peer = ReplicaLoad(), 0 if source is None else 160
        now = 1000 + place / 1000
        if costs.wants(GPU, source, now + 0.1):
            costs.observe(Outcome(GPU, "a", source, "cuda_ipc", load, now, 200, 200 - peer, peer, 0.1, 0.1))
    learnt = costs.report().samples
    assert learnt == 4000 if source else 900 <= learnt <= 1100


@pytest.mark.parametrize("reports", [True, False])
def test_after_a_hundred_requests_the_median_error_is_small(reports: bool) -> None:
    costs = CostModel()
    machine = Machine(costs)
    machine.play(100, reports=reports)
    machine.play(100, reports=reports)
    error = costs.median_error()
    assert error is not None
    assert error < 0.15
    assert costs.uncertainty() == pytest.approx(error, rel=0.3)


def test_a_machine_that_is_slow_for_a_while_is_expected_to_be_and_changes_little_of_what_was_learnt() -> None:
    costs = CostModel()
    machine = Machine(costs)
    machine.play(300)
    usual = prefill_seconds(costs, GPU, 0, 8000)
    machine.slower = 1.8
    machine.play(10)
    assert costs.model(GPU).slowdown.factor(machine.now) == pytest.approx(
        1.8 * usual / prefill_seconds(costs, GPU, 0, 8000), rel=0.2
    )
    assert prefill_seconds(costs, GPU, 0, 8000) < 1.25 * usual
    assert costs.report().prefill[0].slowdown > 1.3
    assert costs.model(CPU).slowdown.factor(machine.now) == 1.0
    machine.slower, machine.now = 1.0, machine.now + 120
    assert costs.model(GPU).slowdown.factor(machine.now) == pytest.approx(1.0, abs=0.01)


def test_a_machine_that_stays_slow_is_learnt() -> None:
    costs = CostModel()
    machine = Machine(costs)
    machine.play(300)
    usual = prefill_seconds(costs, GPU, 0, 8000)
    machine.slower = 1.8
    machine.play(200)
    assert prefill_seconds(costs, GPU, 0, 8000) == pytest.approx(1.8 * usual, rel=0.15)
    assert costs.model(GPU).slowdown.factor(machine.now) == pytest.approx(1.0, abs=0.2)


def test_in_waves_the_error_stays_small() -> None:
    costs = CostModel()
    machine = Machine(costs)
    machine.play(100)
    for _ in range(4):
        machine.slower = 1.6 if machine.slower == 1.0 else 1.0
        machine.play(25)
    error = costs.median_error()
    assert error is not None
    assert error < 0.16


def test_outliers_do_not_lead_it_astray() -> None:
    costs = CostModel()
    Machine(costs).play(200, outliers=0.1)
    error = costs.median_error()
    assert error is not None
    assert error < 0.2


def test_the_terms_are_those_of_the_machine() -> None:
    costs = CostModel()
    Machine(costs, noise=0.03).play(400)
    for cached, new in ((0, 2000), (0, 30_000), (28_000, 2000), (0, 8000)):
        fixed, prompt_token, new_token, pair, _ = Machine.terms
        paid = new - costs.model(GPU).free_tokens
        real = fixed + prompt_token * (cached + new) + new_token * paid + pair * pairs(cached + new - paid, paid)
        assert prefill_seconds(costs, GPU, cached, new) == pytest.approx(real, rel=0.1)
    real = Machine.import_seconds + 16_000 * Machine.token_bytes / Machine.bytes_second
    assert costs.transfer_seconds("a", "b", "cuda_ipc", 16_000, device="cuda") == pytest.approx(real, rel=0.1)


def test_a_pair_without_transfers_is_expected_to_be_like_the_others() -> None:
    costs = CostModel()
    Machine(costs).play(200)
    known = costs.transfer_seconds("a", "b", "cuda_ipc", 16_000, device="cuda")
    assert costs.transfer_seconds("c", "d", "cuda_ipc", 16_000, device="cuda") == pytest.approx(known, rel=0.2)


def test_models_do_not_teach_each_other() -> None:
    costs = CostModel()
    Machine(costs).play(100)
    assert terms(costs, CPU) == terms(CostModel(), CPU)
    assert terms(costs, ModelKey("cuda", "other")) == terms(CostModel(), GPU)


def test_an_import_of_which_little_came_says_nothing_of_the_size_of_tokens_or_of_the_pair() -> None:
    """Its bytes are those that were copied, its tokens those that were good: 100 MB a token would end all imports."""
    costs = CostModel()
    Machine(costs, noise=0.03).play(100)
    before = costs.transfer_seconds("a", "b", "cuda_ipc", 16_000, device="cuda")
    computing = prefill_seconds(costs, GPU, 0, 16_000)
    copied = 16_000 * Machine.token_bytes
    for good in (16, 0) * 10:
        failed = Outcome(
            GPU, "a", "b", "cuda_ipc", IDLE, 0.0, 16_000, 16_000 - good, good, 1.0, computing + 3.0, 3.0, copied,
            import_failed=True,
        )  # fmt: skip
        costs.observe(failed)
    assert costs.transfer_seconds("a", "b", "cuda_ipc", 16_000, device="cuda") == before
    assert prefill_seconds(costs, GPU, 0, 16_000) == pytest.approx(computing, rel=0.05)


def test_the_report_names_every_model_and_pair() -> None:
    costs = CostModel()
    Machine(costs).play(50)
    report = costs.report()
    assert (report.samples, report.samples_kept) == (50, 50)
    assert [(found.device, found.model) for found in report.prefill] == [("cuda", "m")]
    assert [(found.taker, found.source, found.transport) for found in report.transfers] == [
        ("", "", "cuda_ipc"),
        ("a", "b", "cuda_ipc"),
    ]
    assert all(found.samples > 0 for found in report.prefill)
    assert all(found.samples > 0 for found in report.transfers)


def test_an_imports_size_is_that_of_its_windows_and_states_and_of_its_tokens() -> None:
    costs = CostModel()
    costs.size_imports("cuda", 0.0, 0.0)  # of a table that does not say
    before = costs.transfer_terms("a", "b", "cuda_ipc", "cuda")
    costs.size_imports("cuda", 30e6, 1000.0)
    fixed, each = costs.transfer_terms("a", "b", "cuda_ipc", "cuda")
    assert fixed - before[0] == pytest.approx(30e6 / 300e9)
    assert each == pytest.approx(1000.0 / 300e9)
    assert costs.transfer_seconds("a", "b", "cuda_ipc", 5000, device="cuda") == pytest.approx(fixed + 5000 * each)
