"""The parts of the small Stable Diffusion pipeline: tokenizer, text encoder, UNet, VAE, scheduler."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cmlora.sprites.draw import BACKS, COLOURS, CONCEPTS, HELD, SHAPES, WORN
from cmlora.sprites.figures import SIZE

TEXT_WIDTH = 96
TEXT_LENGTH = 32

WORDS = (
    *SHAPES, *COLOURS, *WORN[1:], *HELD[1:], *BACKS, *CONCEPTS,
    "a", "an", "the", "of", "and", "with", "on", "in", "picture", "photo", "drawing", "creature", "wearing", "holding",
    "background", "style", "cute", "small", "big",
)  # fmt: skip
"""Each of these is one token."""


def make_vae() -> AutoencoderKL:
    """Images [n, 3, 64, 64] to latents [n, 4, 16, 16]. Norm groups of 6 channels: smaller ones lose colour."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=1.0,  # the standardisation of the latents is folded into quant_conv
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """Three levels of two layers; the first down and the last up block have cross-attention, as in SD1.5."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 96."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=256,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level BPE with just the merges that make one token of each of `WORDS`."""
    merges = _merges(WORDS)
    letters = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 173)] + [chr(c) for c in range(174, 256)]
    letters += [chr(256 + k) for k in range(68)]  # GPT-2's stand-ins for the 68 bytes that do not print
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab, rules = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: index for index, token in enumerate(dict.fromkeys(tokens))}))
    rules.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    made = CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)
    made.save_pretrained(folder)
    return made


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte pair encoding trained until every word is one token: the most frequent pair first, then alphabetically."""
    parts = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(part) > 1 for part in parts):
        counts: dict[tuple[str, str], int] = {}
        for part in parts:
            for pair in pairwise(part):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        parts = [_join(part, best) for part in parts]
    return merges


def _join(part: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for token in part:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids [n, TEXT_LENGTH], padded as the pipeline pads them."""
    ids = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    tensor: torch.Tensor = ids.input_ids
    return tensor


def make_pipeline(tokenizer: Any, text_encoder: Any, unet: Any, vae: Any) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline without a safety checker."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
