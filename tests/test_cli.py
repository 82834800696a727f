"""The command line prints its progress and its result; of what other libraries say, only what matters."""

import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from cmlora import sprites
from cmlora.cli import app
from cmlora.lab.quiet import leave_out_harmless_messages
from cmlora_kernels.chips import TARGETS
from cmlora_kernels.inspect import INSPECTED_RANKS

ROOT = Path(__file__).resolve().parents[1]
PROGRESS = re.compile(r".*\d+%\|.*\d+/\d+ \[.*")


def test_generate_prints_progress_and_result_alone(tmp_path):
    command = f"generate --model {sprites.model_path()} --lora zebrin=character --lora tophat --steps 2"
    main = "from cmlora.cli import main; main()"
    arguments = [*command.split(), "--prompt", "a zebrin creature", "--out", str(tmp_path / "made.png")]
    done = subprocess.run(
        [sys.executable, "-c", main, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith("cmlora: character, tophat; 2 steps\n")
    assert done.stdout.endswith(f"wrote {tmp_path / 'made.png'}\n")
    lines = [line.strip("\x1b[A ") for line in re.split(r"[\r\n]", done.stderr)]
    assert any(line.startswith("cmlora: 100%") for line in lines)
    assert [line for line in lines if line and not PROGRESS.fullmatch(line)] == []


def test_kernels_are_inspected_in_parts(monkeypatch):
    """What is asked for, and nothing else, is compiled."""
    asked = []
    monkeypatch.setattr("cmlora_kernels.inspect.inspect_kernels", lambda *a, **k: asked.append((*a, k)) or iter(()))
    arguments = "inspect-kernels --target gfx942 --model sdxl --rank 64 --rank 128 --json"
    assert CliRunner().invoke(app, arguments.split(), catch_exceptions=False).output == "[]\n"
    assert CliRunner().invoke(app, ["inspect-kernels", "--json"], catch_exceptions=False).output == "[]\n"
    assert asked[0] == (["gfx942"], ["sdxl"], {"ranks": [64, 128]})
    assert asked[1] == (TARGETS, ("sd15", "sdxl"), {"ranks": INSPECTED_RANKS})


def test_generate_draws_masks(tmp_path):
    """A box for one LoRA, one that is shared, and the picture of where they act."""
    made, shown = tmp_path / "made.png", tmp_path / "masks.png"
    arguments = ["generate", "--model", sprites.model_path(), "--prompt", "a zebrin creature", "--steps", "2"]
    arguments += ["--lora", "zebrin=character", "--lora", "tophat", "--lora", "sketch", "--shared", "sketch"]
    arguments += ["--method", "composite", "--combine", "local", "--lora-prompt", "tophat=wearing a tophat"]
    arguments += ["--region", "character=0,0,0.5,1", "--out", str(made), "--masks", str(shown)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "character acts in 50% of the image" in done.output
    grid = np.asarray(Image.open(shown).convert("HSV"))[28:, :, 1]  # saturation, below the labels
    _, character, tophat = (grid[:, left : left + 192] for left in (0, 200, 400))
    assert grid.shape == (192, 592)
    assert character[:, 120:].max() < 5 < tophat[:, 120:].max(), "what lies outside of the box is grey"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--region nobody=0,0,1,1", "--region nobody=0,0,1,1: no --lora of the name nobody; there are a, b"),
        ("--region a=0,0,1", "--region a=0,0,1: neither a file nor x0,y0,x1,y1"),
        ("--region a=0,0,1,2", "--region a=0,0,1,2: must be 0 <= x0 < x1 <= 1"),
        ("--region a", "--region a: must be NAME=..."),
        ("--region a=pyproject.toml", "--region a=pyproject.toml: no picture"),
        ("--region a=0,0,1,1 --region a=0,0,1,1", "--region names a twice"),
        ("--region a=0,0,1,1 --method switch", "--region goes with routed, composite, cmlora, not with switch"),
        ("--region a=0,0,1,1 --shared a", "--region a=...: a is --shared"),
        ("--shared nobody", "--shared nobody: no --lora of the name nobody"),
        ("--lora-prompt a=text --method routed", "--lora-prompt goes with composite, cmlora, not with routed"),
        ("--masks x.png --compare merge,routed", "--masks shows one run"),
        ("--masks x.png --method merge", "--masks needs --method routed"),
    ],
)
def test_wrong_options_are_named(arguments, message):
    command = f"generate --model {sprites.model_path()} --lora zebrin=a --lora tophat=b --prompt p {arguments}"
    with pytest.raises(typer.BadParameter) as error:
        get_command(app).main(command.split(), standalone_mode=False)
    assert message in error.value.message


@pytest.fixture
def heard():
    """Messages of diffusers' loggers, from warnings on, that reach a handler."""

    class Ears(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    said, ears, root = [], Ears(logging.WARNING), logging.getLogger("diffusers")
    level = root.level
    root.addHandler(ears)
    root.setLevel(logging.WARNING)
    yield said
    root.removeHandler(ears)
    root.setLevel(level)


def test_real_warnings_still_come_through(heard):
    """A LoRA none of whose keys fits the UNet, beside the harmless word about the text encoder."""
    pipe = StableDiffusionPipeline.from_pretrained(sprites.model_path(), torch_dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        leave_out_harmless_messages()
        pipe.load_lora_weights(
            {"other.to_q.lora_A.weight": torch.zeros(2, 4), "other.to_q.lora_B.weight": torch.zeros(4, 2)}
        )
        pipe.load_lora_weights(sprites.lora_path("zebrin"), adapter_name="one")
        pipe.load_lora_weights(sprites.lora_path("tophat"), adapter_name="two")
        warnings.warn("Already found something else", UserWarning, stacklevel=1)
    assert any("No LoRA keys associated to UNet2DConditionModel" in said for said in heard)
    assert not any("CLIPTextModel" in said for said in heard)
    assert "Already found something else" in [str(warning.message) for warning in caught]
    assert not any("peft_config" in str(warning.message) for warning in caught)
