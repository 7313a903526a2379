"""Tiny transformers models with random weights, in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as typed

transformers: Any = typed  # incomplete type annotations
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
PICTURE: dict[str, Any] = {**TINY, "image_size": 32, "patch_size": 16}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "and", "bird"]
SQUARE: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def save_models(folder: Path) -> Path:
    """Write a model of each type with its processor to a folder of its own, by `save_pretrained`."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    towers = {"text_config": {**TINY, "vocab_size": 50}, "vision_config": PICTURE, "projection_dim": 8}
    speech = {**TINY, "conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_conv_pos_embeddings": 4}
    model_and_processor: dict[str, tuple[Any, Any]] = {
        "ast": (
            transformers.ASTModel(transformers.ASTConfig(**TINY, max_length=64, num_mel_bins=32)),
            transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64),
        ),
        "wav2vec2": (
            transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**speech, num_conv_pos_embedding_groups=2)),
            transformers.Wav2Vec2FeatureExtractor(),
        ),
        "clip": (
            transformers.CLIPModel(transformers.CLIPConfig(**towers)),
            transformers.CLIPImageProcessor(**SQUARE),
        ),
        "dinov2": (
            transformers.Dinov2Model(transformers.Dinov2Config(**PICTURE)),
            transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
        ),
        "videomae": (
            transformers.VideoMAEModel(transformers.VideoMAEConfig(**PICTURE, num_frames=6)),
            transformers.VideoMAEImageProcessor(**SQUARE),
        ),
        "bert": (
            transformers.BertModel(transformers.BertConfig(**TINY, vocab_size=len(WORDS), max_position_embeddings=8)),
            transformers.BertTokenizer(str(vocabulary)),
        ),
        "classifier": (
            transformers.ViTForImageClassification(transformers.ViTConfig(**PICTURE)),
            transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
        ),
    }
    for name, (model, processor) in model_and_processor.items():
        torch.manual_seed(0)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    # CLIP takes no token types, which transformers 4 does not ignore.
    names = ["input_ids", "attention_mask"]
    transformers.BertTokenizer(str(vocabulary), model_input_names=names).save_pretrained(folder / "clip")
    return folder
