"""The comparison, with a model that predicts from KV in a way that can be followed, and with a small real one."""

import numpy as np
import pytest

from engine.quality.coded_prefix import coded, floats
from engine.quality.comparison import STEPS_EACH, compared
from engine.quality.errors import QualityNotMeasured
from engine.quality.results import Given
from transport.frames.codecs import NAMES, named

GIVEN = Given("made up", NAMES, 2, 64, 8, 4, 16)
SHAPE = (2, 2, 64, 2, 32)


class MadeUp:
    """Its KV is noise, and so are its predictions, by what is kept of that."""

    def __init__(self):
        self.asked = []

    def prefix(self, tokens):
        values = np.random.default_rng(int(tokens[0])).standard_normal(SHAPE).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16), np.arange(64, dtype=np.float64)

    def prefix_in_pieces(self, tokens):
        return self.prefix(tokens)[0] ^ np.uint16(1)

    def follow(self, arms, last, given):
        self.asked.append([arm.name for arm in arms])
        return np.stack([self._chances(arm, len(given)) for arm in arms])

    def continue_greedily(self, arms, last, count):
        return np.stack([np.full(count, int(arm.stays.sum() + arm.position)) for arm in arms])

    def _chances(self, arm, count):
        kept = floats(arm.bits)[:, :, arm.stays].mean(axis=(0, 1, 2, 3))
        logits = np.tile(kept * 20 + arm.position, (count, 1)).astype(np.float32)
        logits[:, 0] += arm.position - 64
        return logits - np.log(np.exp(logits - logits.max()).sum(axis=1, keepdims=True)) - logits.max()


def rows_of(model, **changed):
    documents = [np.arange(first, first + 80) % 30 for first in (1, 2)]
    steps = []
    rows = {row.name: row for row in compared(model, documents, GIVEN, steps.append)}
    assert len(steps) == STEPS_EACH * 2
    return rows


def test_what_is_exact_changes_nothing_and_is_asked_once():
    model = MadeUp()
    rows = rows_of(model)
    assert "raw-z" not in model.asked[0]
    for name in ("raw", "raw-z"):
        assert (rows[name].divergence_mean, rows[name].agreement, rows[name].perplexity_change) == (0.0, 1.0, 0.0)
        assert (rows[name].equal_tokens, rows[name].keys_decibels, rows[name].quality) == (4.0, None, "exact")


def test_fewer_bits_diverge_more_and_take_less_room():
    rows = rows_of(MadeUp())
    for better, worse in (("raw", "int8"), ("int8", "rot4"), ("rot4", "rot3")):
        assert rows[better].divergence_mean < rows[worse].divergence_mean
        assert rows[better].token_bytes > rows[worse].token_bytes
    assert rows["int8"].keys_decibels > rows["rot4"].keys_decibels > rows["rot3"].values_decibels > 10
    assert {rows[name].quality for name in ("int8", "rot4", "rot3", "mix", "dropped")} == {"lossy"}


def test_dropped_tokens_take_no_room_and_renumbered_ones_are_told_apart():
    rows = rows_of(MadeUp())
    assert rows["dropped"].token_bytes == pytest.approx(rows["raw"].token_bytes * 45 / 64)
    assert rows["dropped, renumbered"].divergence_mean > rows["dropped"].divergence_mean > 0
    assert rows["dropped"].keys_decibels is None
    assert rows["dropped"].equal_tokens == 0.0
    assert rows["noise floor"].quality == "exact"


def test_bytes_are_those_of_whole_frames():
    bits, _ = MadeUp().prefix(np.array([1]))
    found = coded(named("raw"), bits, 16)
    assert (found.bits == bits).all()
    assert found.frame_bytes > bits.nbytes + 4 * 76


def test_without_a_document_there_is_nothing_to_measure():
    with pytest.raises(QualityNotMeasured, match="no text of 73 tokens"):
        compared(MadeUp(), [], GIVEN)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models

    directory = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(40)}, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    from engine.quality.model import Model

    return Model(directory)


def test_a_real_model_predicts_from_restored_kv_what_it_predicts_from_its_own(small_model):
    import torch

    tokens = np.random.default_rng(0).integers(0, 40, 80)
    rows = {row.name: row for row in compared(small_model, [tokens], GIVEN)}
    assert rows["raw"].divergence_mean == 0.0
    assert rows["noise floor"].divergence_mean < 1e-6
    assert rows["int8"].divergence_mean < rows["rot3"].divergence_mean
    assert rows["dropped, renumbered"].divergence_mean > rows["rot3"].divergence_mean
    with torch.inference_mode():
        logits = small_model._model(torch.from_numpy(tokens)[None]).logits[0, 64:72]
    loss = -torch.log_softmax(logits, dim=-1)[torch.arange(8), torch.from_numpy(tokens[65:73])].mean()
    assert np.log(rows["raw"].perplexity) == pytest.approx(float(loss), abs=1e-3)
