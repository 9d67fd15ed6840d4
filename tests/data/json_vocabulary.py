"""A small byte-level tokenizer.json with GLM's special tokens, made by the library `tokenizers` itself."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from glmv_jax.data.tokenizer import SPECIALS

NAMES = [name for name in SPECIALS if name != "<pad>"]
TEXT = ["the cat sat on the mat, 3 cats and 12 dogs", "What is in the picture?", "数一数有几个爱心？", "<tool> |user|>"]


def build(size: int = 400) -> tokenizers.Tokenizer:
    """Words merge over 60 times; as in GLM's own, the tags of thinking and tools are added tokens but not special."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"\s*[\r\n]+|\s?\p{L}+|\p{N}|\s?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(TEXT * 5, trainer)
    for name in NAMES:
        made.add_tokens([tokenizers.AddedToken(name, special=name.startswith(("<|", "[", "<s")), normalized=False)])
    return made


def write(folder, **files: str) -> None:
    """tokenizer.json and tokenizer_config.json, ready for transformers."""
    build().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name, text in files.items():
        (folder / name).write_text(text)
