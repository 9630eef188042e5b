"""The real model's tokenizer: text that was cut up gets the ids of the whole, also when part of it was seen before."""

from pathlib import Path

from tokenizers import Tokenizer

from gateway.prompts.tokenizer.encoder import EncoderMaker

DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "gateway/prompts/tokenizer/text_cuts.py",
    "tests/unit/gateway/prompts/tokenizer/test_text_cuts.py",
)


def test_documents_and_turns_get_the_ids_of_the_whole(running_fleet) -> None:
    check(Path(running_fleet.model_dir))


def check(model: Path) -> None:
    """Compare for documents, one by one and growing turn by turn."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    encoder = EncoderMaker(tokenizer)(64 << 20)
    assert encoder._cuts is not None
    here, so_far = Path(__file__).parents[2], ""
    for name in DOCUMENTS:
        so_far += f"<|im_start|>user\n{(here / name).read_text('utf-8')}<|im_end|>\n"
        for text in (so_far, so_far[: len(so_far) // 2], so_far):
            assert encoder.encode(text, False) == tokenizer.encode(text, add_special_tokens=False).ids
