"""Small vocabularies for tests, made on the spot."""

from __future__ import annotations

import io
import json
import pathlib

import sentencepiece

TEXTS = ["a photo of a cat", "a red heart on a table", "一只猫的照片", "桌子上的红心", "数一数有几个爱心 two cats"] * 20


def gemma_like(folder: pathlib.Path, size: int = 420) -> pathlib.Path:
    """A folder with tokenizer.json as transformers' own class of SigLIP 2 saves it: BPE with bytes, pad 0, eos 1."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, trainers
    from transformers import Siglip2Tokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    model.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    model.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    trained = json.loads(model.to_str())["model"]
    tokenizer = Siglip2Tokenizer(
        vocab=trained["vocab"], merges=[tuple(m) for m in trained["merges"]], add_eos_token=True, padding_side="right")
    tokenizer.save_pretrained(folder)
    return folder


def sentencepiece_file(path: pathlib.Path, **options) -> pathlib.Path:
    """A unigram model of 295 pieces without any of GLM's special tokens."""
    model = io.BytesIO()
    defaults = dict(vocab_size=330, byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, **(defaults | options))
    path.write_bytes(model.getvalue())
    return path
