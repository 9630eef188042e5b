"""Turns a GGUF file into a directory of safetensors: `python convert.py GGUF DIRECTORY NAME CONTEXT_TOKENS`.

Runs as a separate process, so that whoever wants a model never imports torch. What was quantised in the GGUF file is
expanded to bfloat16; the directory loads like any unquantised checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def convert(gguf: Path, directory: Path, name: str, context_tokens: int) -> None:
    """Write config, tokenizer, chat template and bfloat16 weights of `gguf` to `directory`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the weights stay packed GGUF blocks, which cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = context_tokens
    tokenizer.save_pretrained(directory)
    _rename(directory / "config.json", name)


def _rename(config_file: Path, name: str) -> None:
    """Give the model its proper name: the GGUF file carries that of a training run."""
    config = json.loads(config_file.read_text("utf-8"))
    for key in ("_name_or_path", "_model_name_or_path"):
        if key in config:
            config[key] = name
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
