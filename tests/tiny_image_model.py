"""A tiny BLIP-2: a real model that answers prompts of an image and words. vLLM starts it without torchvision."""

from pathlib import Path

WORDS_END = 1000
"""Word `w<i>` is token id i. The ids behind are special ones."""
IMAGE_TOKENS = 16
"""Tokens that an image takes, before the words."""
_SIDE = 56


def write_tiny_image_model(folder: Path) -> Path:
    """Write its config, random weights, tokenizer and image processor into `folder`; return that."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, PreTrainedTokenizerFast
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    special = ["<pad>", "</s>", "<s>", "<unk>", "<image>"]
    words = {f"w{i}": i for i in range(WORDS_END)} | {word: WORDS_END + i for i, word in enumerate(special)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **names)
    images = BlipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    Blip2Processor(images, wrapped, num_query_tokens=IMAGE_TOKENS).save_pretrained(folder)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    language = {"hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "init_std": 0.1}
    config = Blip2Config(
        vision_config=small | {"image_size": _SIDE, "patch_size": 14, "initializer_range": 0.1},
        qformer_config=small | {"vocab_size": len(words), "encoder_hidden_size": 64, "initializer_range": 0.1},
        text_config=language | {"model_type": "opt", "vocab_size": len(words), "max_position_embeddings": 2048},
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=words["<image>"],
        initializer_range=0.1,
    )
    torch.manual_seed(1)
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    return folder
