"""The comparison of settings: which combinations, that a run resumes, and that its figures are what they say."""

from typing import ClassVar

import numpy as np
import pytest

from cmlora.errors import ConfigError
from cmlora.lab import likeness, quality, report, settings
from cmlora.lab.quality import Picture
from cmlora.sprites import draw, role_of


@pytest.mark.parametrize(("size", "count"), [(2, 16), (3, 48), (4, 64), (5, 32)])
def test_combinations_have_one_character_and_distinct_roles_and_halves_share_none(size: int, count: int) -> None:
    found = quality.combinations(size)
    assert len(set(found)) == count
    for loras in found:
        roles = [role_of(name) for name in loras]
        assert roles[0] == "character"
        assert len(set(roles)) == size
    halves = [set(quality.choose_combinations(size, half)) for half in ("choose", "report")]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == set(found)


@pytest.fixture(scope="module")
def shipped() -> quality.Evaluator:
    return quality.Evaluator.load()


class FakeEvaluator:
    """Draws nothing; notes what it was asked for."""

    asked: ClassVar[list[tuple[str, ...]]] = []

    @classmethod
    def load(cls) -> "FakeEvaluator":
        return cls()

    def draw(self, loras, setting, config, seeds, steps):
        self.asked.append((*loras, setting))
        pictures = [
            Picture(
                loras, setting, config, seed, steps, "a prompt", dict.fromkeys(loras, 0.9), True, 1.0, 1.0, 1.0, 2.0
            )
            for seed in seeds
        ]
        return pictures, np.zeros((len(seeds), 64, 64, 3), np.uint8)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "Evaluator", FakeEvaluator)
    compared = {"merge": {"method": "merge"}, "deep": {"cache_branch": (1, 0)}}
    whole = quality.run(tmp_path, compared, (2, 5), limit=2)
    assert len(whole) == 8
    log = tmp_path / "quality.jsonl"
    kept = log.read_text().splitlines()
    log.write_text("\n".join([*kept[:5], kept[5][:40]]) + "\n")  # the sixth line was cut off
    FakeEvaluator.asked.clear()
    again = quality.run(tmp_path, compared, (2, 5), limit=2)
    assert len(FakeEvaluator.asked) == 3
    assert {p.key for p in again} == {p.key for p in whole}
    FakeEvaluator.asked.clear()
    quality.run(tmp_path, {"merge": {"method": "merge", "cache_interval": 1}}, (2,), limit=1)
    assert len(FakeEvaluator.asked) == 1  # another configuration of the same name is another picture


def test_settings_with_a_lora_that_makes_trouble_share_their_combinations(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "Evaluator", FakeEvaluator)
    FakeEvaluator.asked.clear()
    quality.run(tmp_path, settings.TROUBLE, (3,), limit=2)
    assert all({"dotkin", "lantern"} <= set(asked) for asked in FakeEvaluator.asked)
    assert len(FakeEvaluator.asked) == 2 * len(settings.TROUBLE)


def test_the_interval_is_that_of_the_mean() -> None:
    x = (np.random.default_rng(1).random(400) < 0.3).astype(float)
    mean, low, high = report.mean_with_interval(x)
    half = 1.96 * x.std() / 20  # the normal interval
    assert mean == pytest.approx(x.mean())
    assert low == pytest.approx(mean - half, abs=0.01)
    assert high == pytest.approx(mean + half, abs=0.01)
    assert report.mean_with_interval([1.0] * 5) == (1.0, 1.0, 1.0)


def test_a_gain_is_between_pictures_of_the_same_combination_and_noise() -> None:
    """Scores that differ far more between combinations than between settings."""
    level, better = np.random.default_rng(3).uniform(0.1, 0.8, 12), np.random.default_rng(4).uniform(0.02, 0.06, 12)
    pictures = [
        Picture((f"lora {i}", "other"), name, {}, 0, 10, "", {"lora": float(score)}, False, 1.0, 1.0, 1.0, 1.0)
        for i in range(12)
        for name, score in (("first", level[i]), ("second", level[i] + better[i]))
    ]
    alone = Picture(("lora 99", "other"), "second", {}, 0, 10, "", {"lora": 0.0}, False, 1.0, 1.0, 1.0, 1.0)
    mean, low, high = report.gain([*pictures, alone], "second", "first")
    assert mean == pytest.approx(better.mean())
    assert 0 < low < mean < high < 0.06
    assert report.gain([alone], "second", "first") is None
    assert "gain over first" in report.cost_table(pictures)


def test_a_setting_is_read_and_a_wrong_one_named() -> None:
    name, config = settings.parse_setting("mine:method=cmlora,cache_branch=(0, 1),dominant_weight=2.5")
    assert (name, config) == ("mine", {"method": "cmlora", "cache_branch": (0, 1), "dominant_weight": 2.5})
    with pytest.raises(ValueError, match="NAME:field=value"):
        settings.parse_setting("mine:method")
    with pytest.raises(ValueError, match="swap must be one of overtrained, rank64, got 'dotkin'"):
        settings.parse_setting("mine:swap=dotkin")
    _, config = settings.parse_setting("mine:method=merge,weights={'style': 0.4, 'object': 2}")
    assert [quality.weight_of(name, config) for name in ("neon", "lantern", "scarf")] == [0.4, 2.0, 1.0]
    with pytest.raises(ValueError, match=r"weights must be of the roles .* got hat"):
        settings.parse_setting("mine:weights={'hat': 0.4}")
    with pytest.raises(ConfigError, match="combine must be one of"):
        settings.parse_setting("mine:combine=sum")


def test_what_is_compared_is_what_it_says(shipped) -> None:
    """Each LoRA alone is drawn as the plain pipeline draws it, PEFT's cat is the plain merge, lowered is lower."""
    loras = ("zebrin", "tophat")

    def drawn(config):
        pictures, pixels = shipped.draw(loras, "setting", config, [0], 3)
        assert pictures[0].distance > 0
        return pixels[0]

    def plain(names, weights):
        shipped.pipe.set_adapters([quality.adapter_name(name) for name in names], weights)
        seed = quality.seed_of(loras, 0)
        prompt = draw.captions(quality.scene_of(loras, seed))
        return (shipped._call(prompt, 3, [seed])[0] * 255 + 0.5).astype(np.uint8)

    merge = {"method": "merge", "cache_interval": 1}
    alone = np.concatenate([plain(["zebrin"], [1.0]), plain(["tophat"], [1.0])], 1)
    assert np.abs(drawn({**merge, "alone": True}).astype(int) - alone).max() <= 1
    assert np.abs(drawn({"peft": "cat"}).astype(int) - plain(loras, [1.0, 1.0])).max() <= 1
    assert np.abs(drawn({**merge, "weights": 0.6}).astype(int) - plain(loras, [0.6, 0.6])).max() <= 1


def test_broken_pictures_are_farther_from_what_can_be_drawn(shipped) -> None:
    renders = draw.render(draw.sample(40, seed=5, concepts=0.5))
    broken = np.random.default_rng(0).permuted(renders.reshape(40, 8, 8, 8, 8, 3), axis=3).reshape(renders.shape)
    near, far = shipped.realism.distance(renders), shipped.realism.distance(broken)
    assert np.median(near) < 1.3
    assert np.median(far) > np.percentile(near, 90)


def test_a_picture_is_liker_the_loras_that_it_shows(tmp_path, monkeypatch) -> None:
    """With a judge that sees the mean colour: what mixes its LoRAs' colours is liker them than what shows another's."""
    colours = {"zebrin": (250, 0, 0), "tophat": (0, 250, 0), "scarf": (0, 0, 250)}
    pictures = []
    for loras in (("zebrin", "tophat"), ("zebrin", "scarf"), ("tophat", "scarf")):
        other = next(name for name in colours if name not in loras)
        shown = {"each alone": loras, "both": (loras,), "another": ((other,),)}
        for setting, groups in shown.items():
            config = {"alone": True} if setting == "each alone" else {}
            made = Picture(loras, setting, config, 0, 1, "", dict.fromkeys(loras, 1.0), True, 1.0, 1.0, 1.0, 1.0)
            means = [np.mean([colours[n] for n in np.atleast_1d(group)], axis=0) for group in groups]
            tiles = [np.full((64, 64, 3), mean, np.uint8) for mean in means]
            (tmp_path / "pictures").mkdir(exist_ok=True)
            quality._save(np.concatenate(tiles, 1), tmp_path / "pictures" / quality.picture_name(made))
            pictures.append(made)
    monkeypatch.setattr(likeness, "load_judge", lambda: None)
    monkeypatch.setattr(likeness, "features", lambda _, x: x.mean((1, 2)).astype(np.float32))
    text = likeness.likeness_table(pictures, tmp_path)
    assert "knows 100% of 6 pictures of one LoRA; by chance 1 in 3" in text
    scores = {
        line.split(" | ")[0].strip("| "): float(line.split(" | ")[1].split()[0]) for line in text.splitlines()[4:]
    }
    assert scores["each alone"] == pytest.approx(1, abs=1e-3)
    assert scores["each alone"] > scores["both"] > 0.3 > scores["another"]
    assert report.contact_sheet(pictures, tmp_path).exists()  # pictures of each alone are wider, and not on the sheets
    assert report.settings_sheet(pictures, tmp_path).exists()
