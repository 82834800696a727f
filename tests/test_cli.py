"""The command line prints its progress and its result; of what other libraries say, only what matters."""

import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from cmlora import sprites
from cmlora.lab.quiet import leave_out_harmless_messages

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
