"""What documents tell people to type: Python runs, on the shipped model in two steps; commands have these options."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
import typer
from diffusers import ControlNetModel, StableDiffusionPipeline
from PIL import Image

import cmlora
from cmlora import sprites
from cmlora.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "csrc_docs"
TUTORIALS = sorted(path.name for path in (DOCS / "tutorials").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

STAND_INS = {
    '"path/or/hub-id"': repr(sprites.model_path()),
    '"path/to/model"': repr(sprites.model_path()),
    "torch.float16": "torch.float32",
    '"cuda"': '"cpu"',
    '"nezuko.safetensors"': repr(sprites.lora_path("zebrin")),
    '"bamboo.safetensors"': repr(sprites.lora_path("checker")),
    '"lcm.safetensors"': repr(sprites.lora_path("balloon")),
}


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


def run(code: str, names: dict) -> None:
    """A block; where it accelerates and draws nothing, one picture more."""
    for word, stand_in in STAND_INS.items():
        code = code.replace(word, stand_in)
    if "accelerate(" in code and ".images" not in code:
        code += "image = pipe(prompt).images[0]\n"
    code = re.sub(r"(?:, num_inference_steps=\d+)?(, guidance_scale=[\d.]+)?\)\.images", r"\1, **FEW).images", code)
    exec(compile(code, "example", "exec"), names)


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    """What the texts suppose to be there already."""
    monkeypatch.chdir(tmp_path)
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    given = {"FEW": {"num_inference_steps": 2}, "cmlora": cmlora}
    return given | {"prompt": "a zebrin creature", "picture": picture, "edges": picture, "hole": picture.convert("L")}


def pipe_with(*adapters: str) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(sprites.model_path(), torch_dtype=torch.float32)
    for adapter, concept in zip(adapters, sprites.CONCEPTS, strict=False):
        pipe.load_lora_weights(sprites.lora_path(concept), adapter_name=adapter)
    return pipe


def test_there_are_the_tutorials():
    wanted = ("accelerators", "characters", "cluster", "controlnet", "first", "kernel", "rule")
    assert [f"{name}.md" for name in wanted] == TUTORIALS


@pytest.mark.parametrize("path", [ROOT / "README.md", DOCS / "tutorials" / "first.md"], ids=lambda path: path.stem)
def test_the_first_lines_run_as_they_stand(path, names):
    names = {
        "FEW": names["FEW"],
        "prompt": names["prompt"],
        "names": ["character", "background"],
    }  # nothing is imported yet
    for code in blocks(path, "python"):
        run(code, names)
    assert names["image"].size == (64, 64)


def test_the_characters_tutorial_runs(names):
    names |= {"pipe": pipe_with("anna", "bert"), "names": ["anna", "bert"]}
    for code in blocks(DOCS / "tutorials" / "characters.md", "python"):
        run(code, names)
        assert "anna" in cmlora.summary(names["pipe"]).adapters


def test_the_accelerators_tutorial_runs(names):
    names["pipe"] = pipe_with("anna", "bert")
    (code,) = blocks(DOCS / "tutorials" / "accelerators.md", "python")
    run(code, names)
    assert "lcm" not in cmlora.summary(names["pipe"]).adapters


def test_the_controlnet_tutorial_runs(names, tmp_path, monkeypatch):
    net = ControlNetModel.from_unet(pipe_with().unet, conditioning_embedding_out_channels=(8, 16, 32))
    net.save_pretrained(tmp_path / "path" / "to" / "controlnet")
    load = f'pipe.load_lora_weights({sprites.lora_path("zebrin")!r}, adapter_name="character")'
    monkeypatch.setitem(STAND_INS, "# ... load LoRAs as always", load)
    for code in blocks(DOCS / "tutorials" / "controlnet.md", "python"):
        run(code, names)
        assert cmlora.summary(names["pipe"]).adapters == ("character",)


def test_the_rule_of_the_tutorial_takes_the_strongest_deviation():
    (code,) = blocks(DOCS / "tutorials" / "rule.md", "python")
    names: dict = {}
    exec(f"def rule(noise):\n{textwrap.indent(code, '    ')}", names)
    noise = torch.randn(4, 2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    made = names["rule"](noise)
    for row, y, x in ((0, 0, 0), (0, 3, 6), (1, 4, 2)):
        apart = [noise[i, row, :, y, x] - noise[0, row, :, y, x] for i in range(1, 4)]
        strongest = max(apart, key=lambda one: float(one.abs().sum()))
        assert torch.equal(made[row, :, y, x], noise[0, row, :, y, x] + strongest)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_have_the_options_that_documents_name(path, tmp_path, monkeypatch):
    """Parsed, and a sweep's words made into one; nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    for name in ("bed", "loras", "path/to/model", "path/to/stable-diffusion"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a.png", "b.png", "nezuko.safetensors", "bamboo.safetensors", "FILE"):
        (tmp_path / name).touch()
    for info in blocks(path, "json"):
        (tmp_path / "INFO.json").write_text(info)
    for way in ("run", "run_on_ray"):
        monkeypatch.setattr(f"cmlora.lab.sweep.run.{way}", lambda *_: "")
    group = typer.main.get_command(app)
    for line in "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace(" ... ", " --lora-dir loras --model path/to/model "), comments=True)
        for start in (i for i, word in enumerate(words) if word in ("cmlora", "cmlora.cli")):
            name, *rest = [word for word in words[start + 1 :] if word != "&&"]
            command = group.commands[name]
            with command.make_context(name, rest) as context:
                if name == "sweep":
                    command.invoke(context)
