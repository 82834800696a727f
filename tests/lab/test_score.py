"""Scores are those of the models, sets are the unit of intervals, a tie is a tie, and nothing is scored twice."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)
from typer.testing import CliRunner

from cmlora import CMLoRAError, sprites
from cmlora.cli import app
from cmlora.lab.score import run, tables
from cmlora.lab.score.metrics import METRICS, Detector
from cmlora.lab.score.pictures import Shot, labels_of, read_shots

IDS = {"zebrin": ("a zebrin creature",), "tophat": ("wearing a tophat",), "scarf": ("wearing a scarf",)}


def make_shot(folder: Path, method: str, loras: tuple[str, ...], seed: int = 0, kind: str = "composed") -> Shot:
    path = folder / f"{method}_{'_'.join(loras)}_{seed}.png"
    pixels = np.random.default_rng([*path.name.encode()]).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    triggers = {name: IDS.get(name, (name,)) for name in loras}
    return Shot(path, path.name, path.name, kind, method, 1, loras, triggers, "best, a zebrin creature", seed)


def column(values: dict[str, dict]) -> tables.Column:
    """From label -> (set, seed) -> value."""
    shots, scores = [], {}
    for label, pairs in values.items():
        for (loras, seed), value in pairs.items():
            name = f"{label} {loras} {seed}"
            shots.append(Shot(Path(name), name, "", "composed", label, 1, loras, {}, "", seed))
            scores[name] = {"values": {"x": value}}
    return tables.columns(shots, "m", scores)[0]


def test_ties_are_no_wins_and_sets_are_the_unit():
    a, b, c = ("a", "x"), ("b", "x"), ("c", "x")
    made = column({
        "one": {(a, 0): 3.0, (a, 1): 1.0, (b, 0): 2.0, (c, 0): 9.0},
        "other": {(a, 0): 1.0, (a, 1): 1.0, (b, 0): 2.5},  # c was never drawn
    })  # fmt: skip
    found = tables.versus(made, "one", "other")
    assert (found.wins, found.ties, found.losses) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert found.difference[0] == (1.0 + -0.5) / 2, "mean over the sets a (of two seeds) and b"
    wide = tables.versus(made, "one", "other", tie=0.5)
    assert (wide.wins, wide.ties, wide.losses) == pytest.approx((1 / 3, 2 / 3, 0))
    assert made.sets["one"] == {a: 2.0, b: 2.0, c: 9.0}
    assert tables.versus(made, "one", "absent") is None
    assert "| one | other |" not in tables.versus_table(made, "other")


def test_intervals_over_sets_are_those_of_resampled_sets():
    """Two sets, one of many seeds: the mean of a resample is one of three values, whatever the seeds do."""
    a, b = ("a", "x"), ("b", "x")
    made = column({"one": {**{(a, seed): 0.0 for seed in range(50)}, (b, 0): 1.0}})
    assert "0.500 (0.000-1.000)" in tables.table(made)


def test_nothing_is_scored_twice_but_what_changed(tmp_path, monkeypatch):
    shots = [make_shot(tmp_path, method, ("zebrin", "tophat")) for method in ("merge", "routed", "switch")]
    first = run.score(shots, tmp_path / "s", {"detector": ""})["detector"]
    log = tmp_path / "s" / "detector.jsonl"
    log.write_text(log.read_text()[:-20])  # killed in the middle of a line
    changed = Shot(**{**vars(shots[0]), "sha256": "other"})
    asked = []

    class Watched(Detector):
        def score(self, shots):
            asked.extend(shot.method for shot in shots)
            return super().score(shots)

    monkeypatch.setitem(METRICS, "detector", Watched)
    again = run.score([changed, *shots[1:]], tmp_path / "s", {"detector": ""})["detector"]
    assert asked == ["merge", "switch"]
    assert {file: record["loras"] for file, record in again.items()} == {f: r["loras"] for f, r in first.items()}
    run.score([changed, *shots[1:]], tmp_path / "s", {"detector": ""})
    assert len(asked) == 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP of random weights, in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(Path(sprites.model_path()) / "tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 20}
    vision = {**small, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder


def test_clip_scores_are_the_models_own(clip, tmp_path):
    shots = [make_shot(tmp_path, "merge", ("zebrin", "tophat")), make_shot(tmp_path, "merge", ("zebrin",), kind="solo")]
    marks = METRICS["clip"](str(clip), shots).score(shots)
    model, tokenizer = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    pixels = CLIPImageProcessor.from_pretrained(clip)
    for shot, mark in zip(shots, marks, strict=True):
        own = [", ".join(words) for words in shot.triggers.values()]
        for text, got in (
            (", ".join(own), mark.values["triggers"]),
            (shot.prompt, mark.values["prompt"]),
            *zip(own, mark.loras.values(), strict=True),
        ):
            words = tokenizer([text], return_tensors="pt", truncation=True, max_length=20)
            logits = model(**words, **pixels(images=[shot.open()], return_tensors="pt")).logits_per_image
            want = max(0.0, 100 * float(logits / model.logit_scale.exp()))
            assert got == pytest.approx(want, abs=1e-3)


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    """A DINOv2 of random weights, in a folder."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**small)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**sizes).save_pretrained(folder)
    return folder


def torchmetrics_clip(folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """As torchmetrics wants it: features are tensors, which transformers 5 wraps."""
    model = CLIPModel.from_pretrained(folder)
    for name in ("get_image_features", "get_text_features"):
        features = getattr(model, name)
        setattr(model, name, lambda *given, features=features: features(*given).pooler_output)
    return model, CLIPProcessor(CLIPImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def test_the_command_scores_as_torchmetrics_and_transformers_do(clip, dino, tmp_path):
    from torchmetrics.functional.multimodal import clip_score

    pictures = tmp_path / "bed" / "output_x"
    for name in ("merge_zebrin_tophat_1", "routed_zebrin_tophat_1", "solo_zebrin_1", "solo_tophat_1"):
        place = pictures / f"{len(name.split('_')) - 2}_elements" / f"{name}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        make_shot(tmp_path, name, ()).path.rename(place)
    models = {"clip": clip, "clip-image": clip, "dino": dino}
    words = [f"--metric={name}={model}" for name, model in models.items()]
    done = CliRunner().invoke(app, ["score", str(tmp_path / "bed"), "--loras=sprites", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    scores = {name: run.read_lines(tmp_path / "bed" / "scores" / f"{name}.jsonl") for name in models}
    shots = {shot.file: shot for shot in read_shots(tmp_path / "bed", "sprites")}
    assert [len(records) for records in scores.values()] == [4, 4, 4]
    for record in scores["clip"]:
        shot = shots[record["file"]]
        pixels = torch.from_numpy(np.asarray(shot.open()).copy()).permute(2, 0, 1)
        for text, got in (
            (shot.prompt, record["values"]["prompt"]),
            *((", ".join(own), record["loras"][name]) for name, own in shot.triggers.items()),
        ):
            want = clip_score(pixels, text, lambda: torchmetrics_clip(clip))
            assert got == pytest.approx(max(0.0, float(want)), abs=1e-3)
    pooled = {"clip-image": torchmetrics_clip(clip)[0].get_image_features}
    dinov2 = Dinov2Model.from_pretrained(dino)
    pooled["dino"] = lambda pixels: dinov2(pixels).pooler_output
    processors = {
        "clip-image": CLIPImageProcessor.from_pretrained(clip),
        "dino": BitImageProcessor.from_pretrained(dino),
    }
    for metric, features in pooled.items():
        made = {}
        for file, shot in shots.items():
            made[file] = features(processors[metric](shot.open(), return_tensors="pt")["pixel_values"])[0]
        solo = {shot.loras[0]: made[file] for file, shot in shots.items() if shot.kind == "solo"}
        for record in scores[metric]:
            if shots[record["file"]].kind == "solo":
                assert not record["values"], "no other picture of the same LoRA"
                continue
            for name, got in record["loras"].items():
                assert got == pytest.approx(
                    float(torch.cosine_similarity(made[record["file"]], solo[name], 0)), abs=1e-5
                )
            assert record["values"]["similarity"] == pytest.approx(np.mean([*record["loras"].values()]))


def test_similarity_is_to_the_loras_own_pictures(clip, tmp_path):
    solo = [make_shot(tmp_path, "solo", (name,), seed, "solo") for name, seed in (("zebrin", 0), ("tophat", 0))]
    copy = make_shot(tmp_path, "merge", ("zebrin", "tophat"))
    copy.path.write_bytes(solo[0].path.read_bytes())
    marks = METRICS["clip-image"](str(clip), [*solo, copy]).score([copy, solo[0]])
    assert marks[0].loras["zebrin"] == pytest.approx(1, abs=1e-5)
    assert marks[0].loras["tophat"] < 1
    assert marks[1] is None, "no other picture of the same LoRA"
    with pytest.raises(CMLoRAError, match="needs the LoRAs' solo pictures"):
        METRICS["dino"](str(clip), [copy])


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    shots = [make_shot(tmp_path, "merge", ("zebrin", "tophat"))]
    for module in ("ImageReward", "hpsv2"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, message in (
        ("imagereward", "needs the package image-reward: pip install image-reward"),
        ("hpsv2", "needs the package hpsv2"),
        ("clip", "give --metric clip=FOLDER"),
    ):
        with pytest.raises(CMLoRAError, match=message) as error:
            run.score(shots, tmp_path / "s", {name: "absent/model"})
        assert "\n" not in str(error.value)
        assert not (tmp_path / "s").exists()
    with pytest.raises(CMLoRAError, match="knows the shipped LoRAs alone, got hat"):
        run.score([make_shot(tmp_path, "merge", ("hat",))], tmp_path / "s", {"detector": ""})
    with pytest.raises(CMLoRAError, match="--metric must be one of"):
        run.parse_metric("beauty")


def test_packages_of_others_that_do_not_work_are_named(tmp_path, monkeypatch):
    """image-reward 1.5 asks transformers for what is gone, hpsv2 1.2.0 lacks a file; weights that are not there."""
    shots = [make_shot(tmp_path, "merge", ("zebrin", "tophat"))]
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hpsv2").mkdir()
    (tmp_path / "hpsv2" / "__init__.py").touch()
    for broken in (
        "ImportError('\\nit needs another package\\nand says so')",
        "OSError('no words')",
        "AttributeError('x')",
    ):
        (tmp_path / "hpsv2" / "img_score.py").write_text(f"raise {broken}")
        with pytest.raises(CMLoRAError, match=r"^metric hpsv2 cannot import its hpsv2 \((it needs another|no words|x)"):
            run.score(shots, tmp_path / "s", {"hpsv2": ""})
    (tmp_path / "hpsv2" / "img_score.py").write_text(
        "def score(path, prompt, cp=None, hps_version='v2.0'):\n"
        "    return [{'v2.1': 0.25, 'v2.0': 0.5}[hps_version] if cp is None else float(open(cp).read())]\n"
    )
    importlib.invalidate_caches()
    (tmp_path / "own.pt").write_text("0.75")
    for model, want in (("", 0.25), ("v2.0", 0.5), (str(tmp_path / "own.pt"), 0.75)):
        found = run.score(shots, tmp_path / "s", {"hpsv2": model})["hpsv2"]
        assert found[shots[0].file]["values"] == {"preference": want}
    with pytest.raises(CMLoRAError, match="model 'v9' cannot be loaded; give --metric hpsv2=FILE, a checkpoint"):
        run.score(shots, tmp_path / "s", {"hpsv2": "v9"})


def test_pictures_of_others_are_scored_by_their_names(tmp_path):
    """CMLoRA's layout: an interval in the name, "naive" before the ids where no LoRA acts."""
    pictures = tmp_path / "output_anime" / "2_elements"
    pictures.mkdir(parents=True)
    for name in (
        "composite_zebrin_tophat_1",
        "composite_zebrin_tophat_3",
        "naivezebrin_tophat_1",
        "merge_zebrin_scarf_2",
    ):
        shutil.copy(make_shot(tmp_path, name, ()).path, pictures / f"{name}.png")
    for path in tmp_path.glob("*.png"):
        path.unlink()
    shots = read_shots(tmp_path, "sprites", "anime")
    assert sorted(labels_of(shots)) == [
        "composite, interval 1",
        "composite, interval 3",
        "merge, interval 2",
        "no_lora",
    ]
    assert shots[0].prompt.endswith(", a zebrin creature, wearing a tophat")
    done = CliRunner().invoke(app, ["score", str(tmp_path), "--loras", "sprites"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "scores" / "detector.png").stat().st_size > 1000
    assert "| composite, interval 3 | 1 |" in (tmp_path / "scores" / "scores.md").read_text()
    lines = (tmp_path / "scores" / "detector.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert set(json.loads(lines[0])["values"]) == {"concept", "present"}
    with pytest.raises(CMLoRAError, match=r"name the INFO.json of its pictures with --loras"):
        read_shots(tmp_path)
