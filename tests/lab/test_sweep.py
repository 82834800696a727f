"""A sweep draws the same pictures however often it is killed and whoever draws them, and says what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from cmlora import CMLoRAError, sprites
from cmlora.lab.score.pictures import read_shots
from cmlora.lab.sweep.folder import Folder, picture_path, read_manifest, read_published, write_atomically
from cmlora.lab.sweep.info import find_sets, parse_info, read_info
from cmlora.lab.sweep.jobs import Job, make_units
from cmlora.lab.sweep.options import make_sweep
from cmlora.lab.sweep.run import Place, run, run_on_ray
from cmlora.lab.sweep.settings import PRESETS

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--sizes", "2", "--limit", "1", "--steps", "2"]


def composlora() -> dict:
    """As the published one: three characters, two of each other type."""
    kinds = {"character": 3, "clothing": 2, "style": 2, "background": 2, "object": 2}
    return {
        kind: [{"id": f"{kind}_{n}", "name": "", "trigger": [f"{kind} {n}", "x"]} for n in range(1, count + 1)]
        for kind, count in kinds.items()
    }


def small(**changed):
    """A sweep of one set of two LoRAs: 8 pictures of 2 steps."""
    given = dict.fromkeys(("lora_dir", "model", "preset", "methods", "intervals", "seeds", "layout"))
    options = given | {"loras": "sprites", "style": "none", "settings": (), "sizes": "2", "limit": 1}
    return make_sweep(**(options | {"drawing": {"steps": 2}} | changed))


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("output_*/*/*.png")}


def told(folder: Path) -> list[dict]:
    """The manifest, but for the seconds."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in read_manifest(folder)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(small(), folder, Place())
    return folder


def test_a_sweep_that_is_killed_twice_ends_as_an_unbroken_one(unbroken, tmp_path):
    command = [sys.executable, "-m", "cmlora.cli", "sweep", "--out", str(tmp_path), *SMALL]
    for count in (2, 5):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(pictures(tmp_path)) < count:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert count <= len(pictures(tmp_path)) < len(pictures(unbroken))
    last = max(tmp_path.rglob("*.png"), key=lambda path: path.stat().st_mtime)
    last.write_bytes(last.read_bytes()[:-50])  # a disk that was full, a hand that slipped
    report = run(small(), tmp_path, Place())
    assert report.missing == 0 < report.there
    assert pictures(tmp_path) == pictures(unbroken)
    assert told(tmp_path) == told(unbroken)
    assert run(small(), tmp_path, Place()).drawn == 0


def test_processes_share_a_folder_and_one_that_is_lost_is_made_up_for(unbroken, tmp_path):
    first = run(small(), tmp_path, Place(0, 2))
    assert first.drawn > 0
    assert first.missing > 0
    assert run(small(), tmp_path, Place(1, 2)).missing == 0
    assert pictures(tmp_path) == pictures(unbroken)
    assert told(tmp_path) == told(unbroken)


def test_a_file_is_written_though_another_process_tidies_up_meanwhile(tmp_path, monkeypatch):
    """Two that end at the same time: one removes the folder of what is half written while the other writes there."""
    sync, times = os.fsync, []

    def tidy(number):
        sync(number)
        times.append(number)
        if len(times) == 1:
            shutil.rmtree(tmp_path / ".tmp")

    monkeypatch.setattr(os, "fsync", tidy)
    write_atomically(tmp_path / "manifest.jsonl", b"all", tmp_path)
    assert (tmp_path / "manifest.jsonl").read_bytes() == b"all"
    assert len(times) == 2


def test_floor_solo_and_merge_are_the_plain_pipelines(unbroken):
    """Against diffusers and PEFT alone, from the noise that the manifest names."""
    pipe = StableDiffusionPipeline.from_pretrained(sprites.model_path(), torch_dtype=torch.float32)
    records = {record["method"]: record for record in read_manifest(unbroken)}
    assert {"no_lora", "solo", "merge"} < set(records)
    assert len({record["noise"] for record in read_manifest(unbroken) if len(record["loras"]) == 2}) == 1
    for method in ("no_lora", "solo", "merge"):
        record = records[method]
        pipe.unload_lora_weights()
        for name in record["loras"] if method != "no_lora" else ():
            pipe.load_lora_weights(sprites.lora_path(name), adapter_name=name)
        if method != "no_lora":
            pipe.set_adapters(record["loras"])
        noise = torch.Generator().manual_seed(record["noise"])
        image = pipe(record["prompt"], num_inference_steps=2, guidance_scale=4.0, generator=noise).images[0]
        drawn = Image.open(unbroken / record["file"])
        apart = [abs(a - b) for a, b in zip(image.tobytes(), drawn.tobytes(), strict=True)]
        assert max(apart) <= 1, method


def test_noise_depends_on_set_and_seed_alone():
    loras = read_info("sprites")
    units = make_units(small(sizes="3,2", limit=2, seeds="1,0", methods="merge,no_lora", intervals="1,2"))
    noise = {(frozenset(job.ids), job.seed): set() for unit in units for job in unit}
    for job in (job for unit in units for job in unit):
        noise[frozenset(job.ids), job.seed].add(job.noise)
    assert all(len(found) == 1 for found in noise.values())
    assert len({next(iter(found)) for found in noise.values()}) == len(noise)
    assert Job("composed", "merge", {}, loras[:3], 1, 0).noise == Job("floor", "x", {}, loras[2::-1], 5, 0).noise


def test_sets_prompts_and_presets_are_the_published_ones():
    loras = parse_info(composlora(), "info")
    counts = {size: len(find_sets(loras, size)) for size in (2, 3, 4, 5)}
    assert counts == {2: 24, 3: 72, 4: 96, 5: 48}
    assert sum(counts.values()) == 240
    for chosen in find_sets(loras, 3):
        assert chosen[0].type == "character"
        assert max(Counter(lora.type for lora in chosen).values()) == 1
    sweep = small(style="anime", preset="cmlora", loras="sprites")
    job = next(job for unit in make_units(sweep) for job in unit if job.method == "cmlora")
    assert job.prompt(sweep.style) == ", ".join(
        [sweep.style.prefix, *(word for lora in job.loras for word in lora.triggers)]
    )
    assert PRESETS["cmlora"].intervals == (1, 2, 3, 5)
    assert sweep.drawing.steps == 2, "what is given goes before the preset"
    assert sweep.drawing.guidance == 8.5


@pytest.mark.parametrize("layout", ["own", "cmlora", "composition"])
def test_layouts_are_read_as_they_are_written(layout, tmp_path):
    loras = parse_info(composlora(), "info")
    sets = find_sets(loras, 2)
    jobs = [Job("composed", "cmlora", {}, sets[5], 1 if layout == "composition" else 3, 0)]
    jobs += [Job("floor", "no_lora", {}, sets[7], 1, 0)]
    for job in jobs:
        path = tmp_path / picture_path(job, layout, "anime")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    if layout == "cmlora":  # the published code's own name of the base model's pictures
        path.rename(path.with_name(path.name.replace("no_lora_", "naive")))
    found = [(r["method"], tuple(r["loras"]), r["interval"], r["kind"]) for r in read_published(tmp_path, sets)]
    assert sorted(found) == sorted((job.method, job.ids, job.interval, job.kind) for job in jobs)


def test_loras_that_do_not_fit_are_named_before_anything_is_drawn(tmp_path):
    loras = tmp_path / "loras"
    shutil.copytree(Path(sprites.lora_path("zebrin")).parent, loras)
    ids = [job.ids for unit in make_units(small()) for job in unit][-1]
    tensors = load_file(loras / f"{ids[0]}.safetensors")
    save_file({name: t[..., :-1].contiguous() for name, t in tensors.items()}, loras / f"{ids[0]}.safetensors")
    save_file({"other.lora_A.weight": torch.zeros(2, 2)}, loras / f"{ids[1]}.safetensors")
    with pytest.raises(CMLoRAError) as error:
        run(small(lora_dir=loras), tmp_path / "out", Place())
    assert all(f"{name}.safetensors" in str(error.value) for name in ids)
    assert not pictures(tmp_path / "out")
    (loras / f"{ids[1]}.safetensors").unlink()
    with pytest.raises(CMLoRAError, match=f"no such LoRA file: .*{ids[1]}"):
        run(small(lora_dir=loras), tmp_path / "out2", Place())


def test_a_folder_of_another_sweep_is_refused(unbroken):
    for changed, message in (
        ({"drawing": {"steps": 3}}, "was drawn with steps 2, now it is 3"),
        ({"style": "anime"}, "holds a sweep with style"),
        ({"layout": "cmlora"}, "holds a sweep with layout 'own', now 'cmlora'"),
    ):
        with pytest.raises(CMLoRAError, match=message):
            run(small(**changed), unbroken, Place())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": "merge,magic"}, "--methods must be of .*, got 'magic'"),
        ({"intervals": "0"}, "--intervals must be of"),
        ({"sizes": "two"}, "--sizes must be whole numbers"),
        ({"sizes": "6"}, "sizes must be 2 to 5"),
        ({"preset": "sdxl"}, "--preset must be one of"),
        ({"style": "noir"}, "--style must be none, anime, reality or a JSON file"),
        ({"settings": ("merge:method=merge",)}, "NAME must be new"),
        ({"loras": "absent.json"}, "--loras INFO.json needs --model and --lora-dir"),
        ({"layout": "composition", "intervals": "1,2"}, "has no interval in its names"),
        ({"layout": "cmlora", "seeds": "1,2"}, "has no seed in its names"),
    ],
)
def test_wrong_options_are_named(changed, message):
    with pytest.raises(CMLoRAError, match=message):
        make_units(small(**changed))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"hat": []}, "type must be one of character"),
        ({"character": [{"id": "a"}]}, "must have"),
        ({"character": [{"id": "a/b", "trigger": []}]}, "id must be letters"),
        ({"character": [{"id": "a", "trigger": "word"}]}, "trigger must be a list"),
        ({"character": [{"id": "a", "trigger": []}] * 2}, "id must name one LoRA"),
    ],
)
def test_info_of_another_form_is_named(info, message):
    with pytest.raises(CMLoRAError, match=message):
        parse_info(info, "info")


def test_the_processes_environment_says_who_draws_what(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setitem(os.environ, name, value)
    assert Place.here() == Place(3, 4, 1)


def test_a_manifest_outlives_a_broken_record(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "copy")
    record = next((tmp_path / "copy").rglob("records/*/*.json"))
    record.write_text(record.read_text()[:40])
    jobs = [job for unit in make_units(small()) for job in unit]
    assert Folder(tmp_path / "copy", "own", "none").write_manifest(jobs) == 1
    assert len(read_manifest(tmp_path / "copy")) == len(jobs) - 1
    assert json.loads((tmp_path / "copy" / "sweep.json").read_text())["files"]


def test_an_interrupt_leaves_a_manifest_and_ray_is_asked_for(tmp_path, monkeypatch):
    drawn = []

    class Interrupted:
        def __init__(self, *_):
            pass

        def draw(self, job):
            if len(drawn) == 2:
                raise KeyboardInterrupt
            drawn.append(job)
            return b"", {}

    monkeypatch.setattr("cmlora.lab.sweep.run.Studio", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(small(), tmp_path, Place())
    assert len(read_manifest(tmp_path)) == 2
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CMLoRAError, match=r"pip install 'cmlora\[ray\]'"):
        run_on_ray(small(), tmp_path, 2)


def test_pictures_that_a_killed_run_left_out_of_the_manifest_are_read(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:3]))
    assert sorted(shot.file for shot in read_shots(tmp_path / "copy")) == sorted(pictures(unbroken))
    manifest.unlink()
    assert len(read_shots(tmp_path / "copy")) == len(pictures(unbroken))
