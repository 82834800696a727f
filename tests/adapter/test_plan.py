"""The schedule: what is refreshed when, who dominates, with which weight; the published code's defects among it."""

import itertools
import warnings

import numpy as np
import pytest

from cmlora import AdapterError, CMLoRAConfig, ConfigError
from cmlora.compose.plan import make_plan, order_adapters, partition_adapters, refresh_steps

NAMES = ("character_1", "style_1", "background_1")


def plan(steps=12, names=NAMES, **config):
    config = CMLoRAConfig(**({"combine": "mean"} | config))
    return make_plan(config, order_adapters(names, config), steps)


def dominants(planned):
    assert all(step.early == step.late for step in planned)
    return [step.early for step in planned]


def test_uniform_refreshes_and_rotation():
    planned = plan(7, partition="offline", offline_boundary=1.0, cache_interval=2)
    assert [step.refresh for step in planned] == [(0, 1, 2), (), (1,), (), (0,), (), (1,)]
    assert dominants(planned) == [0, 0, 1, 1, 0, 0, 1]


def test_nonuniform_schedule_caches_at_all():
    refreshed = sorted(refresh_steps(CMLoRAConfig(cache_interval="nonuniform"), 24))
    assert refreshed == [0, 2, 4, 6, 8, 9, 12, 15, 18, 21, 23]


def deepcache_steps(total, count, center, power):
    """DeepCache's schedule in NumPy, negative roots by complex numbers as there."""
    while power > 1:
        roots = [complex(v) ** (1 / power) for v in (-center, total - center)]
        points = np.linspace(*roots, count + 1) ** power
        found = [0] + [int(x) + center for x in np.unique(points.real.astype(np.int32))[1:-1]]
        if len(found) == count:
            break
        power -= 0.02
    return sorted(found)


@pytest.mark.parametrize(("steps", "interval", "center"), [(50, 5, 0.3), (50, 3, 0.3), (100, 5, 0.5), (20, 2, 0.2)])
def test_quadratic_schedule_is_deepcaches(steps, interval, center):
    config = CMLoRAConfig(cache_interval="quadratic", quadratic_interval=interval, quadratic_center=center)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = deepcache_steps(steps, -(-steps // interval), int(center * steps), config.quadratic_power)
    assert sorted(refresh_steps(config, steps)) == want


def test_an_interval_longer_than_the_run_refreshes_once():
    assert [step.refresh for step in plan(4, cache_interval=99)] == [(0, 1, 2), (), (), ()]


def test_weights_sum_to_one_and_the_decay_is_used_down_to_the_floor():
    planned = plan(12, partition="offline", cache_interval=1, dominant_decay=0.5)
    before = [step.dominant_coefficient / step.other_coefficient for step in planned]
    assert before == pytest.approx([max(1.0, 2.5 - sum(0.5**j for j in range(1, k + 1))) for k in range(12)])
    for step in planned:
        assert step.dominant_coefficient + 2 * step.other_coefficient == pytest.approx(1)
    floored = plan(9, cache_interval=1, dominant_decay=1, dominant_floor=1.0)[-1]
    assert floored.dominant_coefficient == pytest.approx(1 / 3)
    constant = plan(9, cache_interval=1, dominant_decay=0)
    assert [step.dominant_coefficient / step.other_coefficient for step in constant] == pytest.approx([2.5] * 9)


def test_two_adapters_get_the_papers_weights():
    step = plan(1, names=NAMES[:2])[0]
    assert (2 * step.dominant_coefficient, 2 * step.other_coefficient) == pytest.approx((1.2, 0.8))


def test_deviations_are_weighted_around_the_base():
    step = plan(1, combine="deviation")[0]
    assert step.slots == (0, 1, 2, -1)
    assert step.dominant_coefficient + 2 * step.other_coefficient == pytest.approx(3)
    assert step.base_coefficient == pytest.approx(1 - 3)
    assert all(s.refresh[-1:] == (3,) for s in plan(6, combine="deviation", partition="offline") if s.refresh)


@pytest.mark.parametrize(("late_stage", "late"), [("shift", [1, 2]), ("low", [2])])
def test_the_late_stage_rotates_over_its_own_adapters_and_refreshes_them(late_stage, late):
    planned = plan(12, partition="offline", offline_boundary=0.5, cache_interval=1, late_stage=late_stage)
    assert set(dominants(planned)[:7]) == {0, 1}
    assert sorted(set(dominants(planned)[7:])) == late
    cached = plan(12, partition="offline", offline_boundary=0.5, cache_interval=2, late_stage=late_stage)
    assert all(step.refresh == (step.early,) for step in cached[8::2])


def test_the_stage_is_a_share_of_the_run_not_a_step_number():
    for steps in (11, 22, 220):
        planned = plan(steps, names=("character_1", "background_1"), partition="offline", cache_interval=1)
        assert dominants(planned).index(1) == steps * 120 // 220 + 1


def test_without_low_adapters_the_early_rule_holds_throughout():
    planned = plan(8, names=("a", "b"), partition="offline", offline_boundary=0.0, cache_interval=1)
    assert dominants(planned) == [0, 1] * 4


def test_online_leaves_the_choice_to_the_device_from_the_second_refresh_on():
    planned = plan(6, partition="online", cache_interval=2)
    assert [(step.early, step.late) for step in planned] == [(0, 0), (0, 0), (1, 2), (1, 2), (0, 1), (0, 1)]
    assert [step.refresh_dominant for step in planned] == [False, False, True, False, True, False]


def test_async_moves_dominance_on_its_own_clock_and_refreshes_who_dominates():
    planned = plan(12, partition="async", async_switch=0.25, offline_boundary=1.0, cache_interval=2)
    assert dominants(planned) == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert [step.refresh for step in planned[2::2]] == [(0,), (1,), (0,), (0,), (1,)]


@pytest.mark.parametrize("partition", ["offline", "online", "async"])
@pytest.mark.parametrize("combine", ["mean", "deviation"])
def test_no_cached_feature_is_older_than_the_bound(partition, combine):
    planned = plan(40, partition=partition, combine=combine, cache_interval=3, max_cache_age=4)
    ages = [0] * len(planned[0].slots)
    for step in planned:
        certain = set(step.refresh)
        assert not (step.refresh_dominant and certain & {step.early, step.late}), "a row would be refreshed twice"
        ages = [0 if p in certain else age + 1 for p, age in enumerate(ages)]
        assert max(ages) <= 4


def test_switch_steps_as_the_callback_of_the_published_code():
    planned = plan(9, method="switch", switch_step=2)
    current, want = 0, []
    for i in range(9):
        want.append((current,))
        if i > 0 and i % 2 == 0:
            current = (current + 1) % 3
    assert [step.slots for step in planned] == want


def test_switch_never_uses_another_adapters_features():
    planned = plan(12, method="switch", switch_step=3, cache_interval=4)
    for before, step in itertools.pairwise(planned):
        assert step.refresh or step.slots == before.slots


STAGES = {"method": "switch", "switch_stages": True, "switch_step": 2, "offline_boundary": 0.5}


def slots(planned):
    return [step.slots[0] for step in planned]


def test_switch_by_stages_begins_each_with_its_first_adapter():
    names = ("background_1", "character_1", "style_1", "background_2")  # rows are high, then low
    assert slots(plan(14, names, **STAGES)) == [0, 0, 0, 1, 1, 0, 0, 1, 2, 2, 3, 3, 2, 2]
    # as many steps of the other stage before it change nothing
    assert slots(plan(10, names, **STAGES | {"offline_boundary": 0.15})) == [0, 0, 2, 2, 3, 3, 2, 2, 3, 3]


def test_switch_by_stages_without_low_adapters_is_the_plain_one():
    names = ("a", "b", "c")
    assert slots(plan(12, names, **STAGES)) == slots(plan(12, names, method="switch", switch_step=2))
    # with low ones alone these are the only ones, and rotate as high ones do
    assert slots(plan(12, ("background_1", "background_2"), **STAGES)) == [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1]


def test_routed_runs_every_adapter_alone_in_its_first_steps_only():
    planned = plan(5, method="routed", mask_steps=2, cache_interval=2)
    assert {(step.slots, step.who) for step in planned} == {((0,), (-1,))}
    assert [step.refresh for step in planned] == [(0,), (), (0,), (), (0,)]
    probes = [step.probe for step in planned]
    assert [probe and (probe.slots, probe.who) for probe in probes] == 2 * [((0, 0, 0, -1), (0, 1, 2, -2))] + 3 * [None]
    assert [probe.refresh for probe in probes[:2]] == [(0, 1, 2, 3), ()]
    drawn = plan(3, method="routed", regions={"style_1": [[1.0]]})
    assert [step.probe for step in drawn] == 3 * [None]


def test_unknown_names_are_high_and_rows_are_high_then_low():
    config = CMLoRAConfig()
    assert partition_adapters(("background_2", "foo", "clothing_1"), config) == (
        ("foo", "clothing_1"),
        ("background_2",),
    )
    assert order_adapters(("background_2", "foo", "clothing_1"), config) == ("foo", "clothing_1", "background_2")
    chosen = CMLoRAConfig(high=["background_2"], low=["foo"])
    assert partition_adapters(("background_2", "foo", "x"), chosen) == (("background_2", "x"), ("foo",))
    with pytest.raises(ConfigError, match=r"high names nobody, but the adapters are a, b"):
        partition_adapters(("a", "b"), CMLoRAConfig(high=["nobody"]))


def test_one_adapter_where_two_are_needed_says_what_to_do():
    with pytest.raises(AdapterError, match=r"at least two adapters, got a; load another"):
        order_adapters(("a",), CMLoRAConfig(method="composite"))
