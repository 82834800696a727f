"""A small Stable Diffusion pipeline of 64x64 px with ten LoRAs, shipped with the package: no GPU, no download.

    pipe = StableDiffusionPipeline.from_pretrained(cmlora.sprites.model_path())
    pipe.load_lora_weights(cmlora.sprites.lora_path("zebrin"), adapter_name="character")
    pipe("a zebrin creature, wearing a crown, blue background", num_inference_steps=25, guidance_scale=4)

The trigger word of a LoRA is its name. Only `train` and `measure` need diffusers.
"""

from __future__ import annotations

from pathlib import Path

from cmlora.sprites.draw import CONCEPTS, ROLES, role_of

__all__ = ["CONCEPTS", "KOHYA", "ROLES", "TROUBLE", "lora_path", "model_path", "role_of"]

WEIGHTS = Path(__file__).parent / "weights"
KOHYA = ("tophat", "checker")
"""The LoRAs that are there in kohya's key format too."""
TROUBLE = {"overtrained": "dotkin", "rank64": "lantern"}
"""Two LoRAs that make trouble on purpose, and the concept of each.

One was trained at weight 1 on pictures of its concept alone, and shows it without its word, too; one has rank 64, eight
times the others', and a part on the text encoder."""


def model_path() -> str:
    """The folder for StableDiffusionPipeline.from_pretrained."""
    return str(WEIGHTS / "model")


def lora_path(name: str, *, kohya: bool = False) -> str:
    """The file for pipe.load_lora_weights of a concept or of one of `TROUBLE`, in diffusers' or kohya's key format.

    Raises ValueError for another name, or for kohya's format of a LoRA that is not in `KOHYA`.
    """
    role_of(TROUBLE.get(name, name))
    if kohya and name not in KOHYA:
        raise ValueError(f"name must be one of {', '.join(KOHYA)} with kohya=True, got {name!r}")
    return str(WEIGHTS / "lora" / f"{name}{'_kohya' if kohya else ''}.safetensors")
