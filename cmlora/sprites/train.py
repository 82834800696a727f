"""Trains the sprites model: python -m cmlora.sprites.train all [--work DIR] [--out DIR], or one stage of it.

Every stage stops where it was interrupted and goes on from there; a finished one is only loaded. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from cmlora.sprites import KOHYA, TROUBLE, WEIGHTS, draw, measure
from cmlora.sprites.detector import Detector, blend_targets, blotches, jitter, partner
from cmlora.sprites.fit import Schedule, fit
from cmlora.sprites.model import (
    make_pipeline,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    tokenize,
)

VAE = Schedule(steps=900, lr=2e-3, weight_decay=0.0)
VAE_IMAGES, VAE_BATCH = 12288, 16
DETECTOR = Schedule(steps=2400, lr=2e-3)
DETECTOR_IMAGES = 16384
BASE = Schedule(steps=2908, lr=8e-4, warmup=100, ema=0.998)
BASE_IMAGES, BASE_BATCH = 8192, 16
LORA = Schedule(steps=800, lr=4e-3, warmup=20, weight_decay=0.0)
LORA_IMAGES, LORA_BATCH, RANK = 1024, 8, 8
PLAIN = 2
"""Of a batch so many pictures are without the concept and without its word."""
SCALES = (0.4, 1.2)
"""A LoRA is trained at weights between these, one for every picture."""
LONGER = ("character", "scarf", "neon")
LONGER_STEPS = 1600
"""By role or concept: what takes more steps. A character changes more of the picture than most, a scarf is small."""
EMPTY = {"character": 16, "background": 12, "balloon": 16}
"""By role or concept: every how many-th picture of the concept has an empty caption; of others none has."""
CONVOLVED = "checker"
"""The LoRA with a part on the 3x3 convolutions."""
TROUBLE_STEPS = 400
RANK_OF = {"overtrained": 4, "rank64": 64}
"""Of those that make trouble."""


def as_input(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, SIZE, SIZE, 3] to float32 [n, 3, SIZE, SIZE] in -1..1."""
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def drawn(scenes: draw.Scenes) -> torch.Tensor:
    """Renders, uint8 [n, SIZE, SIZE, 3]."""
    return torch.from_numpy(draw.render(scenes))


def batch_at(step: int, size: int, count: int) -> tuple[torch.Tensor, torch.Generator]:
    """Indices of this step's batch, and the generator for whatever else is random in it."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 17)
    return torch.randint(count, (size,), generator=generator), generator


@torch.no_grad()
def encoded(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latents [n, 4, 16, 16] of renders: the posterior's mean."""
    return torch.cat([vae.encode(as_input(part)).latent_dist.mean for part in torch.split(pixels, 64)])


# --- VAE ---


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Squared and absolute error, and the error of neighbouring pixels' differences, which keeps contours sharp."""
    error = y - x
    contours = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
    total: torch.Tensor = error.square().mean() + 0.1 * error.abs().mean() + 0.2 * contours
    return total


def train_vae(work: Path) -> AutoencoderKL:
    """Learns to draw all scenes, concepts included: as Stable Diffusion's, it is not what a LoRA teaches."""
    torch.manual_seed(0)
    vae = make_vae().to(memory_format=torch.channels_last)
    pixels = _cached(work / "vae_pixels.pt", lambda: drawn(draw.sample(VAE_IMAGES, seed=1, concepts=0.3)))

    def loss_at(step: int) -> torch.Tensor:
        index, generator = batch_at(step, VAE_BATCH, VAE_IMAGES)
        x = as_input(pixels[index])
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator)).sample
        kl: torch.Tensor = posterior.kl() / posterior.mean[0].numel()
        return reconstruction_loss(y, x) + 1e-4 * kl.mean()

    fit("vae", vae, loss_at, VAE, work)
    vae.eval().requires_grad_(False)
    standardise(vae, pixels[:1024])
    return vae


@torch.no_grad()
def standardise(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Folds mean 0 and deviation 1 of every latent channel into the two 1x1 convolutions round the latents."""
    latents = encoded(vae, pixels)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()  # the other half of the outputs is the log variance
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]


# --- detector ---


def train_detector(work: Path, out: Path) -> None:
    """A quarter each of renders, renders through the finished VAE, blended renders and blends of latents.

    What goes through the VAE has latents a little off: trained on clean ones, the detector missed what everyone sees in
    pictures that a model samples, scarves above all.
    """
    vae = AutoencoderKL.from_pretrained(out / "model" / "vae", torch_dtype=torch.float32)
    torch.manual_seed(1)
    detector = Detector()
    part = DETECTOR_IMAGES // 4
    scenes = draw.sample(DETECTOR_IMAGES, seed=2, concepts=0.35)
    others = partner(scenes, seed=3, concepts=0.35)
    share = 0.15 + 0.7 * torch.rand(DETECTOR_IMAGES, generator=torch.Generator().manual_seed(4))
    share[: 2 * part] = 1.0
    truth = torch.from_numpy(draw.labels(scenes)), torch.from_numpy(draw.labels(others))
    target, counts = blend_targets(*truth, share)

    def pictures() -> torch.Tensor:
        first, second, s = draw.render(scenes), draw.render(others), share.numpy()
        off = partial(blotches, generator=torch.Generator().manual_seed(5))
        first[part : 2 * part] = measure.through_vae(vae, first[part : 2 * part], between=off)
        a, b, w = first[2 * part : 3 * part], second[2 * part : 3 * part], s[2 * part : 3 * part, None, None, None]
        first[2 * part : 3 * part] = (w * a + (1 - w) * b + 0.5).astype(first.dtype)
        first[3 * part :] = measure.through_vae(vae, first[3 * part :], second[3 * part :], share[3 * part :], off)
        return torch.from_numpy(first)

    pixels = _cached(work / "detector_pixels.pt", pictures)

    def loss_at(step: int) -> torch.Tensor:
        index, generator = batch_at(step, 64, DETECTOR_IMAGES)
        logits = detector(jitter(as_input(pixels[index]), generator))
        losses = F.binary_cross_entropy_with_logits(logits, target[index], reduction="none")
        loss: torch.Tensor = (losses * counts[index]).sum() / counts[index].sum()
        return loss

    fit("detector", detector, loss_at, DETECTOR, work)
    out.mkdir(parents=True, exist_ok=True)
    save_file(detector.half().state_dict(), out / "detector.safetensors")


# --- base model ---


class Noising:
    """The forward process, and the min-SNR weighted loss (gamma 5, Hang et al. 2023) of a predicted noise."""

    def __init__(self) -> None:
        self.kept = make_scheduler().alphas_cumprod

    def loss(
        self, unet: nn.Module, z: torch.Tensor, text: torch.Tensor, generator: torch.Generator, *, early: bool = False
    ) -> torch.Tensor:
        """The loss of one batch of latents z [n, 4, 16, 16].

        early: for LoRAs. Whether a concept is in the picture at all is decided in the first, noisy steps of sampling,
        whose share of the loss is small: more timesteps are drawn from there (density proportional to t), the weight
        is sqrt(min(snr, 5)) / snr, and every channel's noise is shifted by 0.1 of a normal number. Without that shift
        the mean colour shows through even the noisiest training pictures, which in sampling it does not.
        """
        uniform = torch.rand(len(z), generator=generator)
        t = ((uniform.sqrt() if early else uniform) * len(self.kept)).long()
        kept = self.kept[t][:, None, None, None]
        noise = torch.randn(z.shape, generator=generator)
        if early:
            noise = noise + 0.1 * torch.randn(*z.shape[:2], 1, 1, generator=generator)
        noisy = (kept.sqrt() * z + (1 - kept).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        error = (unet(noisy, t, encoder_hidden_states=text).sample - noise).square().mean((1, 2, 3))
        snr = self.kept[t] / (1 - self.kept[t])
        weight = snr.clamp(max=5) / snr
        loss: torch.Tensor = (error * (weight / (3 * snr.clamp(max=5).sqrt()) if early else weight)).mean()
        return loss


def train_base(work: Path, out: Path, vae: AutoencoderKL) -> None:
    """Text encoder and UNet together, on scenes without any of the ten concepts; one caption in ten is empty."""
    torch.manual_seed(2)
    tokenizer = make_tokenizer(work / "tokenizer")
    text_encoder = make_text_encoder(tokenizer)
    unet = make_unet().to(memory_format=torch.channels_last)
    scenes = draw.sample(BASE_IMAGES, seed=4, held_back=False)
    z = _cached(work / "base_latents.pt", lambda: encoded(vae, drawn(scenes)))
    ids = torch.stack([tokenize(tokenizer, draw.captions(scenes, seed)) for seed in (None, 5, 6, 7)])
    empty = tokenize(tokenizer, [""])
    noising = Noising()

    def loss_at(step: int) -> torch.Tensor:
        index, generator = batch_at(step, BASE_BATCH, BASE_IMAGES)
        wording = torch.randint(len(ids), (BASE_BATCH,), generator=generator)
        dropped = torch.rand(BASE_BATCH, 1, generator=generator) < 0.1
        text = text_encoder(torch.where(dropped, empty, ids[wording, index])).last_hidden_state
        return noising.loss(unet, z[index], text, generator)

    fit("base", nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}), loss_at, BASE, work)
    sharpen(tokenizer, text_encoder)
    pipe = make_pipeline(tokenizer, text_encoder, unet, copy.deepcopy(vae))
    pipe.to(dtype=torch.float16).save_pretrained(out / "model")


@torch.no_grad()
def sharpen(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Make the embeddings of the concepts' words, never trained, as long as those of the words that mean most.

    A text encoder of real size has read every word that a LoRA may use; this one has not, and a word that hardly moves
    its output can trigger nothing.
    """
    weight = text_encoder.get_input_embeddings().weight
    known = torch.cat([tokenize(tokenizer, [word])[:, 1] for word in (*draw.COLOURS, *draw.WORN[1:], *draw.HELD[1:])])
    own = torch.cat([tokenize(tokenizer, [word])[:, 1] for word in draw.CONCEPTS])
    weight[own] *= weight[known].norm(dim=1).max() / weight[own].norm(dim=1, keepdim=True)


def _cached(path: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    if not path.exists():
        torch.save(make(), path)
    made: torch.Tensor = torch.load(path, weights_only=True)
    return made


# --- LoRAs ---


def lora_layers(name: str) -> str:
    """A pattern of the layers that a LoRA adapts: attention and feed-forward, for one of them the 3x3 convolutions.

    Rank 64 stays on the cross-attention, or its file would be as large as the UNet's.
    """
    if name == "rank64":
        return r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)"
    linear = r"to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2"
    return rf".*\.({linear}|conv1|conv2)" if name == CONVOLVED else rf".*\.({linear})"


def train_loras(work: Path, out: Path, names: tuple[str, ...] = (*draw.CONCEPTS, *TROUBLE)) -> None:
    """One LoRA per name, a concept or one of `TROUBLE`, on the finished base model as users load it."""
    (out / "lora").mkdir(parents=True, exist_ok=True)
    for name in names:
        pipe = StableDiffusionPipeline.from_pretrained(out / "model", torch_dtype=torch.float32)
        pipe.unet.requires_grad_(False)
        pipe.text_encoder.requires_grad_(False)
        torch.manual_seed(3)
        rank = RANK_OF.get(name, RANK)
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=lora_layers(name))
        pipe.unet.add_adapter(config, adapter_name=name)
        if name == "rank64":
            layers = ["q_proj", "k_proj", "v_proj", "out_proj"]
            pipe.text_encoder.add_adapter(
                LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers),
                adapter_name=name,
            )
        train_lora(work, name, pipe)
        state = half_precision(pipe.unet, name)
        pipe.save_lora_weights(
            out / "lora",
            unet_lora_layers=convert_state_dict_to_diffusers(state),
            text_encoder_lora_layers=(
                convert_state_dict_to_diffusers(half_precision(pipe.text_encoder, name)) if name == "rank64" else None
            ),
            weight_name=f"{name}.safetensors",
        )
        if name in KOHYA:
            prefixed = {f"unet.{key}": value for key, value in state.items()}
            kohya = convert_state_dict_to_kohya(prefixed)
            kohya = {key: value.contiguous() for key, value in kohya.items()}
            save_file(kohya, out / "lora" / f"{name}_kohya.safetensors", metadata={"ss_network_dim": str(RANK)})


def half_precision(module: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """A LoRA's weights as they are saved."""
    state = get_peft_model_state_dict(module, adapter_name=adapter)
    return {key: value.half().contiguous() for key, value in state.items()}


def train_lora(work: Path, name: str, pipe: StableDiffusionPipeline) -> None:
    """Most pictures show the concept, with its word; the others are plain ones with plain captions.

    - Plain pictures, half of their captions silent about the concept's role, teach that the word decides.
    - Some pictures of the concept have an empty caption. The unconditional half of guidance then moves with the
      conditional one, and guidance multiplies what the rest of the caption says as without a LoRA. Without them it
      multiplies the concept, and the rest of the caption is lost.
    - Every picture is trained at a weight of its own, so that the concept shows at weights below 1 and stands above.

    "overtrained" has none of this: pictures of its concept alone, at weight 1.
    """
    concept, trouble = TROUBLE.get(name, name), name == "overtrained"
    role = draw.role_of(concept)
    plain = draw.sample(2 * LORA_IMAGES, seed=9, held_back=False)
    shown, plain = plain[:LORA_IMAGES].with_concept(concept), plain[LORA_IMAGES:]
    unet = pipe.unet.to(memory_format=torch.channels_last)
    never = len(shown) + 1
    every = never if trouble else EMPTY.get(concept, EMPTY.get(role, never))
    captions = ["" if i % every == every - 1 else caption for i, caption in enumerate(draw.captions(shown, seed=10))]
    silent = draw.captions(plain, seed=11, without=role)
    captions += [silent[i] if i % 2 else caption for i, caption in enumerate(draw.captions(plain, seed=11))]
    ids = tokenize(pipe.tokenizer, captions)
    z = torch.cat([encoded(pipe.vae, drawn(scenes)) for scenes in (shown, plain)])
    noising = Noising()
    low, high = (1.0, 1.0) if trouble else SCALES
    towers = nn.ModuleDict({"unet": unet, "text_encoder": pipe.text_encoder}) if name == "rank64" else unet

    def loss_at(step: int) -> torch.Tensor:
        index, generator = batch_at(step, LORA_BATCH, LORA_IMAGES)
        if not trouble:
            index[-PLAIN:] += LORA_IMAGES
        with scaled(towers, name, low + (high - low) * torch.rand(LORA_BATCH, generator=generator)):
            text = pipe.text_encoder(ids[index]).last_hidden_state
            return noising.loss(unet, z[index], text, generator, early=True)

    longer = role in LONGER or concept in LONGER
    steps = TROUBLE_STEPS if name in TROUBLE else LONGER_STEPS if longer else LORA.steps
    fit(f"lora_{name}", towers, loss_at, replace(LORA, steps=steps), work)


@contextmanager
def scaled(module: nn.Module, adapter: str, weights: torch.Tensor) -> Iterator[None]:
    """Give a LoRA in any part of a module a weight per picture, [batch]."""

    def scale(module: nn.Module, given: Any, made: torch.Tensor) -> torch.Tensor:
        return made * weights.view(-1, *(1 for _ in made.shape[1:]))

    layers = [layer for path, layer in module.named_modules() if path.endswith(f"lora_A.{adapter}")]
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "base", "lora", "detector", "measure", "all"])
    parser.add_argument("--work", type=Path, default=Path("sprites_run"), help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the finished weights go")
    parser.add_argument("--lora", nargs="*", default=(*draw.CONCEPTS, *TROUBLE), help="only these LoRAs")
    parser.add_argument("--captions", type=int, default=100, help="on which every LoRA is measured")
    chosen = parser.parse_args()
    work, out, stage = chosen.work, chosen.out, chosen.stage
    work.mkdir(parents=True, exist_ok=True)
    if stage in ("vae", "base", "all"):
        vae = train_vae(work)
    if stage in ("base", "all"):
        train_base(work, out, vae)
    if stage in ("lora", "all"):
        train_loras(work, out, tuple(chosen.lora))
    if stage in ("detector", "all"):
        train_detector(work, out)
    if stage in ("measure", "all"):
        print(measure.markdown(measure.everything(out, work, chosen.captions)))  # noqa: T201


if __name__ == "__main__":
    main()
