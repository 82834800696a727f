"""The hook in the place of a module's forward: which rows a call needs, and how N predictions become one."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from cmlora.batch.inputs import Inputs
from cmlora.batch.running import Running
from cmlora.compose.places import Combiner, Routing, read_regions, region_masks
from cmlora.compose.plan import Step, make_plan, make_recipes, order_adapters
from cmlora.config import CMLoRAConfig
from cmlora.engine.footprint import RunShape
from cmlora.engine.run import Lane, Record, Run, with_bases
from cmlora.engine.spending import Spending
from cmlora.engine.work import Work
from cmlora.errors import AdapterError, ConfigError, RunError
from cmlora.lora.bank import AdapterBank, choose_adapters, elsewhere, with_masks
from cmlora.lora.foreign import foreign, must_stay
from cmlora.lora.state import Switches, fingerprint
from cmlora.lora.text import activate
from cmlora.lora.text import check as check_text
from cmlora.models import find_family
from cmlora.models.caller import calling_code
from cmlora.models.family import Call, Place
from cmlora_kernels import dominant_from_latents, high_frequency_share


class Denoiser:
    """Composes the adapters of one pipeline's model; called in the place of its forward.

    Args:
        pipe: the pipeline, for its scheduler; held weakly.
        config: how to compose.
        profiled: whether the config's high and low were measured (high="auto"): they then hold for these adapters only.
    """

    def __init__(self, pipe: Any, config: CMLoRAConfig, *, profiled: bool = False) -> None:
        self.family, self.module = find_family(pipe)
        self._pipe = weakref.ref(pipe)
        self._scheduler = getattr(pipe, "scheduler", None)  # of pipelines that share the module, once `pipe` is gone
        self.config = config = read_regions(config)
        self.profiled = profiled
        self.batched = self.family.batched(self.module, config, Running())
        self.spending = Spending(self.batched, config)
        self._prompted: tuple[object, list[Tensor], Any] | None = None
        self.run: Run | None = None
        self.last_run: Run | None = None
        self._turn = threading.Lock()
        self.names = self._choose_names(first=True)
        self._prompts = self._encode_prompts(pipe)
        self._bank = self._build()
        self._bank_key, self._switches = self._key(), Switches(self.module)
        self._state: tuple[object, ...] = ()

    def open(self) -> None:
        """Put the batched forward on the LoRA layers."""
        self.run = None
        self.spending.open(self._bank)

    def close(self) -> None:
        """Give the layers their own forward back."""
        self.spending.close()

    def __call__(self, **arguments: Any) -> Any:
        """One evaluation of the module, arguments by the names of its forward."""
        with self._one_thread():
            try:
                call = self.family.read(arguments)
                device = call.inputs.sample.device.type
                if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                    raise RunError("torch.autocast is not supported: load the pipeline with torch_dtype=... instead")
                run, lane, inputs = self._locate(call)
                noise = self._step(run, lane, inputs)
            except BaseException:
                self.run = None  # whatever went wrong, the next call starts afresh
                raise
        return self.family.result(noise, call)

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            raise RunError(
                "another thread is in the middle of a step of this pipeline; a pipeline draws one call at a time: "
                "let the threads wait for each other (a lock around the call), or give each a pipeline of its own"
            )
        try:
            yield
        finally:
            self._turn.release()

    @property
    def everyone(self) -> tuple[str, ...]:
        """All adapters that act, shared ones too."""
        return (*self.names, *self.config.shared)

    @property
    def _lenient(self) -> bool:
        """A merge is what the plain pipeline draws, whatever state its adapters are in."""
        return self.config.method == "merge" and self.config.adapters is None and not self.config.shared

    def _encode_prompts(self, pipe: Any) -> dict[str, dict[str, Tensor]]:
        """The adapters' own prompts, each encoded with its own text-encoder part alone, and the shared ones'."""
        encoded = {}
        for name, given in (self.config.prompts or {}).items():
            undo = activate(pipe, (name, *self.config.shared))
            try:
                encoded[name] = self.family.prompt(pipe, name, given)
            finally:
                undo()
        return encoded

    def _with_prompts(self, inputs: Inputs, lane: Lane, place: Place) -> Inputs:
        """The inputs, an adapter's own prompt in the conditional rows of its predictions."""
        if not self._prompts:
            return inputs
        if place.conditional is False:
            return inputs
        if not place.whole and not place.conditional:
            raise RunError(
                "prompts go into the conditional half of the guidance, which is only known in calls of diffusers' own "
                "pipelines; call the pipeline"
            )
        of = [self._prompts.get(name) for name in self.names]
        bases = [] if self.config.combine == "mean" else [p for p in of if p is not None] + [None]
        key = (inputs.conditions()[0].shape, *(id(t) for t in inputs.conditions()), lane.own)
        if self._prompted is None or self._prompted[0] != key:  # the same tensors in every step, as conditions are
            spread = self.family.spread_prompts(inputs, [*of, *bases], lane.own // lane.halves)
            self._prompted = (key, inputs.conditions(), spread)
        prompted: Any = inputs
        return cast("Inputs", replace(prompted, prompts=self._prompted[2]))

    def _key(self) -> tuple[object, ...]:
        return (fingerprint(self.module), self.spending.device)

    def _choose_names(self, *, first: bool) -> tuple[str, ...]:
        """The adapters that take part, in the order of their slots, but for shared ones.

        Raises:
            AdapterError, ConfigError: adapters that are missing, or named where they take no part.
        """
        config, several = self.config, self.config.method != "merge"
        others, none_is_fine = elsewhere(self._pipe(), self.family.attribute), self._lenient and not first
        choose = functools.partial(choose_adapters, self.module, several=several, elsewhere=others)
        if config.shared:
            choose(config.shared)
        names: tuple[str, ...] = ()
        if config.method != "no_lora":
            chosen = choose(config.adapters, lenient=none_is_fine)
            names = tuple(name for name in chosen if name not in config.shared)
            measured = {*config.high, *config.low}
            if self.profiled and measured != {*names}:
                raise AdapterError(
                    f"high='auto' was settled for the adapters {', '.join(sorted(measured))}, which are now "
                    f"{', '.join(names)}; call cmlora.accelerate(pipe, high='auto', ...) again"
                )
            names = order_adapters(names, config)
        for field, given in (("regions", config.regions), ("prompts", config.prompts)):
            unknown = [name for name in given or () if name not in names]
            if unknown:
                raise ConfigError(f"{field} names {', '.join(unknown)}, but the adapters are {', '.join(names)}")
        make_plan(config, names, 1)  # high and low must name adapters that take part
        return names

    def _build(self) -> AdapterBank:
        bank = self.spending.build(make_recipes(self.config, self.names), lenient=self._lenient)
        return with_masks(bank, self.names) if self.config.method == "routed" else bank

    def renew(self, scale: float) -> None:
        """Take over what the layers hold now; stack them anew if adapters, ranks or the device changed."""
        key = self._key()
        if self._bank_key != key:
            self.names = self._choose_names(first=False)
            bank = self._build()
            self.spending.close()
            self._bank, self._bank_key, self._switches = bank, key, Switches(self.module)
            self.spending.open(bank)
        self.spending.renew(scale)
        self._state = (scale, self._switches.now())

    def _locate(self, call: Call) -> tuple[Run, Lane, Inputs]:
        """The run and lane that this call belongs to, and its inputs."""
        pipe = self._pipe()
        place = self.family.place(pipe, getattr(pipe, "scheduler", self._scheduler), call)
        if place.halves > 1 and self.module._forward_pre_hooks and not torch.equal(*call.inputs.sample.chunk(2)):
            place = replace(place, halves=1)  # a user's hook has changed what the pipeline passed
        run, before = self.run, -1
        if run is not None and run.is_continued_by(place):
            if run.thread != threading.get_ident():
                raise RunError(
                    "a run that another thread began cannot be continued by this one; draw an image in one thread"
                )
            before = run.position
            self._follow_changes(run, call.scale)
        else:
            if run is not None and run.is_under_way_elsewhere():
                raise RunError(
                    "another thread is drawing with this pipeline, and both would share its scheduler; let the "
                    "threads wait for each other (a lock around the call), or give each a pipeline of its own"
                )
            must_stay(self.module)  # hooks, processors may have been exchanged since
            self.family.check(self.module)
            self.renew(call.scale)
            if pipe is not None:
                check_text(pipe, self.everyone)
            steps = self.family.steps(pipe, place.schedule, place.index)
            plan = make_plan(self.config, self.names, steps)
            run = Run(plan, place.schedule, place.index, calling_code(), foreign(self.module))
        lane = run.lane_of(call.inputs, place, whole=place.whole)
        lane.fit(call.inputs.sample, place.halves)
        if place.index != before + 1 and lane.position >= 0 and lane.position != place.index - 1:
            lane.cache = None  # steps were left out: what they would have refreshed is missing
        lane.position, lane.sample = place.index, call.inputs.sample
        self.run = self.last_run = run
        return run, lane, self._with_prompts(call.inputs, lane, place)

    def _follow_changes(self, run: Run, scale: float) -> None:
        """Adapters re-weighted, switched on or off in mid-run, by a step callback or another scale."""
        if self._state == (scale, self._switches.now()):
            return
        names = self.names
        self.renew(scale)
        for lane in run.lanes:
            lane.forget()
            if self.names != names:
                lane.cache, lane.weights, lane.dominant, lane.record = None, None, None, []
                lane.combiner = lane.routing = lane.footprint = lane.probe = None
                lane.rows.clear()
        if self.names != names:
            run.plan = make_plan(self.config, self.names, len(run.plan))
            run.strategy = None

    def _plan(self, run: Run, index: int) -> Step:
        if index >= len(run.plan):
            # another pipeline runs this module, not the one whose denoising_end set the length
            run.plan = make_plan(self.config, self.names, run.schedule.shape[0] - run.first)
            for lane in run.lanes:
                lane.forget()
        return run.plan[index]

    def _step(self, run: Run, lane: Lane, inputs: Inputs) -> Tensor:
        index = run.position - run.first
        step = self._plan(run, index)
        if lane.footprint is None:
            self._begin(run, lane, inputs)
        gate = self._choose(lane, step, inputs, index)
        lane.carry_cache(step)
        noise, full = self._predict(run, lane, step, inputs, index)
        probe = None if step.probe is None else self._probe(run, lane, step.probe, inputs, index)
        lane.record.append(_record(lane, step, index, full, gate, probe))
        if step.probe is None:
            lane.probe = None  # its cache is needed no more
        return noise

    def _begin(self, run: Run, lane: Lane, inputs: Inputs) -> None:
        """Before a lane's first step: what comes from the host is brought to the device."""
        if run.foreign and lane.own > lane.halves and any(step.refresh_dominant for step in run.plan):
            raise RunError(
                f"{run.foreign[0]} may mix the images of a batch, and partition='online' lets adapters dominate "
                "image by image; use partition='offline', or one image per call"
            )
        lane.footprint = RunShape.of(inputs, run.plan, lane.halves_alike)
        if run.strategy is None:
            run.strategy = self.spending.strategy(run, lane, inputs)
        device = inputs.sample.device
        for step in run.plan:
            lane.rows_of(step, tuple(range(len(step.slots))), device)
            if step.refresh:
                lane.rows_of(step, step.refresh, device)

    def _predict(self, run: Run, lane: Lane, step: Step, inputs: Inputs, index: int) -> tuple[Tensor, bool]:
        """All predictions of a step, combined: [own, ...], and whether all ran the deep part; refreshes the cache."""
        everyone = lane.rows_of(step, tuple(range(len(step.slots))), inputs.sample.device)
        full = step.full or lane.cache is None
        deep = everyone if full else lane.deep_rows(step, inputs.sample.device)
        combine = self._combination(run, lane, step, inputs)
        masks = None if lane.routing is None else lane.routing.masks
        # the base models are the last predictions, and where an adapter is compared with one its feature follows it
        follow = step.bases if self.config.cache_follow and {*step.bases} <= {*step.refresh} else ()
        cache = None if full else lane.cache
        lane.cache = None  # let go of before its successor is made
        given = combine is not None and combine.masks_given is not None  # which no captured step would take over
        captured = None if step.probe is not None or given else self.spending.captured_steps(run, lane, inputs)
        work = Work(everyone, deep, follow, combine, step.who, self.config.mask_text)
        if captured is not None:
            if not captured.holds(lane.conditions, inputs):
                lane.conditions = captured.begin(inputs, everyone, run.timesteps)
                lane.held = captured.held
            noise, lane.cache = captured.step(inputs, index, work, cache, lane.weights, masks)
            return noise, full
        conditions = self.batched.prepare(inputs, everyone, lane.conditions, run.timesteps)
        lane.conditions, lane.held = conditions, conditions.held
        assert run.strategy is not None
        placing = None if lane.routing is None else lane.routing.placing(step.who, inputs.sample.device)
        at_once = run.strategy.at_once
        noise, lane.cache = work.run(self.batched, inputs, cache, conditions, index, at_once, lane.weights, placing)
        return noise, full

    def _probe(self, run: Run, lane: Lane, step: Step, inputs: Inputs, index: int) -> Record | None:
        """Masks for the next step, from predictions beside those that make the noise."""
        assert lane.routing is not None
        if lane.conditional is False:
            lane.routing.masks = _of_conditional(run).routing.masks  # as the other half has them
            return None
        probe, inputs = lane.probing(inputs)
        noise, full = self._predict(run, probe, step, inputs, index)
        lane.routing.measure(self.batched.as_image(noise, inputs), probe.own, probe.halves)
        return _record(probe, step, index, full, None)

    def _combination(self, run: Run, lane: Lane, step: Step, inputs: Inputs) -> Combiner | None:
        """How the step's predictions become one; None: there is but one, or the first is it."""
        config, sample = self.config, inputs.sample
        routed, local = config.method == "routed", config.combine == "local" and len(step.slots) > 1
        if len(run.lanes) > 1 and (local or (routed and config.regions is None)) and lane.conditional is None:
            raise RunError(
                "masks come from the conditional half of the guidance, and of halves that are called one by one it is "
                "not known which that is; pass both in one batch, or give `regions`, or use combine='deviation'"
            )
        if routed:
            if lane.routing is None:
                height, width = self.batched.latents(inputs).shape[-2:]
                regions = None
                if config.regions is not None:
                    images = lane.own // lane.halves
                    regions = region_masks(config.regions, self.names, (height, width), sample.device)
                    regions = regions.expand(-1, images, -1, -1)
                lane.routing = Routing(config, len(self.names), regions)
            return None
        if len(step.slots) == 1:
            return None
        if lane.combiner is None:
            height, width = self.batched.latents(inputs).shape[-2:]
            lane.combiner = Combiner(config, step, lane.own, lane.halves, self.names, (height, width), sample.device)
        if local and lane.conditional is False:
            lane.combiner.masks_given = _of_conditional(run).combiner.masks
        return lane.combiner

    def _choose(self, lane: Lane, step: Step, inputs: Inputs, index: int) -> Tensor | None:
        """Weights per prediction and image, the dominant adapter where the device decides; returns the gate's m."""
        config, gate = self.config, None
        adapters = step.adapters
        if step.gated and step.rotate:
            assert step.early is not None
            assert step.late is not None
            lane.dominant, weights, gate = dominant_from_latents(
                self.batched.latents(inputs),
                config.online_cutoff,
                config.online_gate,
                step.early,
                step.late,
                adapters,
                step.dominant_coefficient,
                step.other_coefficient,
                backend=config.backend,
            )
            lane.weights = with_bases(weights, step)
        elif lane.weights is None or (step.rotate and not step.gated):
            weights = torch.full((adapters, lane.own), step.other_coefficient, device=inputs.sample.device)
            if step.early is not None:
                weights[step.early] = step.dominant_coefficient
            lane.weights = with_bases(weights, step)
        if gate is None and config.method == "cmlora" and config.partition == "online" and index > 0:
            latents = self.batched.latents(inputs)
            gate = high_frequency_share(latents, config.online_cutoff, backend=config.backend)  # for the summary
        return gate


def _record(lane: Lane, step: Step, index: int, full: bool, gate: Tensor | None, probe: Record | None = None) -> Record:
    assert lane.cache is not None
    assert lane.conditions is not None
    size = lane.cache.nbytes + lane.conditions.bytes
    if probe is not None:
        size += probe.cache_bytes
    dominant = lane.dominant if step.gated else step.early
    return Record(index, step, lane.own, lane.halves, full, dominant, gate, size, probe)


def _of_conditional(run: Run) -> Any:
    """The lane of the conditional half, which has run this step; masks of the other halves are its own."""
    for lane in run.lanes:
        if lane.conditional and lane.position == run.position:
            return lane
    raise RunError("masks come from the conditional half of the guidance, which must be called before the other halves")
