"""The comparison of settings: which combinations, that a run resumes, and that its figures are what they say."""

from typing import ClassVar

import numpy as np
import pytest

from cmlora.errors import ConfigError
from cmlora.lab import quality, report
from cmlora.lab.quality import Picture
from cmlora.sprites import role_of


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


class FakeEvaluator:
    """Draws nothing; notes what it was asked for."""

    asked: ClassVar[list[tuple[str, ...]]] = []

    @classmethod
    def load(cls) -> "FakeEvaluator":
        return cls()

    def draw(self, loras, setting, config, seeds, steps):
        self.asked.append((*loras, setting))
        pictures = [
            Picture(loras, setting, config, seed, steps, "a prompt", dict.fromkeys(loras, 0.9), True, 1.0, 1.0, 2.0)
            for seed in seeds
        ]
        return pictures, np.zeros((len(seeds), 64, 64, 3), np.uint8)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "Evaluator", FakeEvaluator)
    settings = {"merge": {"method": "merge"}, "deep": {"cache_branch": (1, 0)}}
    whole = quality.run(tmp_path, settings, (2, 5), limit=2)
    assert len(whole) == 8
    log = tmp_path / "quality.jsonl"
    kept = log.read_text().splitlines()
    log.write_text("\n".join([*kept[:5], kept[5][:40]]) + "\n")  # the sixth line was cut off
    FakeEvaluator.asked.clear()
    again = quality.run(tmp_path, settings, (2, 5), limit=2)
    assert len(FakeEvaluator.asked) == 3
    assert {p.key for p in again} == {p.key for p in whole}
    FakeEvaluator.asked.clear()
    quality.run(tmp_path, {"merge": {"method": "merge", "cache_interval": 1}}, (2,), limit=1)
    assert len(FakeEvaluator.asked) == 1  # another configuration of the same name is another picture


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
        Picture((f"lora {i}", "other"), name, {}, 0, 10, "", {"lora": float(score)}, False, 1.0, 1.0, 1.0)
        for i in range(12)
        for name, score in (("first", level[i]), ("second", level[i] + better[i]))
    ]
    alone = Picture(("lora 99", "other"), "second", {}, 0, 10, "", {"lora": 0.0}, False, 1.0, 1.0, 1.0)
    mean, low, high = report.gain([*pictures, alone], "second", "first")
    assert mean == pytest.approx(better.mean())
    assert 0 < low < mean < high < 0.06
    assert report.gain([alone], "second", "first") is None
    assert "gain over first" in report.cost_table(pictures)


def test_a_setting_is_read_and_a_wrong_one_named() -> None:
    name, config = quality.parse_setting("mine:method=cmlora,cache_branch=(0, 1),dominant_weight=2.5")
    assert (name, config) == ("mine", {"method": "cmlora", "cache_branch": (0, 1), "dominant_weight": 2.5})
    with pytest.raises(ValueError, match="NAME:field=value"):
        quality.parse_setting("mine:method")
    with pytest.raises(ConfigError, match="combine must be one of"):
        quality.parse_setting("mine:combine=sum")
