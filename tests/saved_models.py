"""Tiny models on disk with a tokenizer of characters, as `from_pretrained` wants them."""

from __future__ import annotations

from pathlib import Path

import tiny_models
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


def tokenizer(template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A token for each ASCII character, of which there are 128, as `tiny_models` have tokens."""
    vocabulary = {chr(i): i for i in range(128)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
    made.chat_template = template
    return made


def save(folder: Path, name: str, template: str | None = None, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A model of `tiny_models` with its tokenizer in a folder."""
    model = tiny_models.build(name, dtype, **changes)
    model.generation_config.eos_token_id = None  # random weights end nothing
    model.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder
