"""The hook at `unet.forward`: where in a run a call stands, which rows it needs, and how N predictions become one."""

from __future__ import annotations

import collections
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from cmlora.batch.rows import Running
from cmlora.compose.plan import BASE, Step, make_plan, order_adapters
from cmlora.config import CMLoRAConfig, Recipe
from cmlora.engine.budget import Strategy, choose, strategies
from cmlora.engine.footprint import RunShape, keep_freed_memory, peak_of_run, predictable
from cmlora.engine.graphs import Capture, Captured, capture_cuda
from cmlora.engine.run import Record, Run, halves_of, with_base
from cmlora.errors import AdapterError, RunError
from cmlora.lora.bank import AdapterBank, build_bank, choose_adapters, elsewhere, fill_bank
from cmlora.lora.layers import install, uninstall
from cmlora.lora.merged import Merging
from cmlora.lora.stacked import fill_stacked, problems, stack_projections
from cmlora.lora.state import fingerprint
from cmlora.lora.winograd import Transforming
from cmlora.models.unet.blocks import check_supported
from cmlora.models.unet.conditions import Inputs
from cmlora.models.unet.step import BatchedUNet
from cmlora_kernels import combine_noise, dominant_from_latents, high_frequency_share, tiles
from cmlora_kernels.launch import arch_of


class Denoiser:
    """Composes the adapters of one UNet; called in the place of its forward.

    Args:
        pipe: the pipeline, for its scheduler; held weakly.
        config: how to compose.
        profiled: whether the config's high and low were measured (high="auto"): they then hold for these adapters only.
    """

    def __init__(self, pipe: Any, config: CMLoRAConfig, *, profiled: bool = False) -> None:
        self._pipe = weakref.ref(pipe)
        self._scheduler = getattr(pipe, "scheduler", None)  # of pipelines that share the UNet, once `pipe` is gone
        self.unet = pipe.unet
        self.config = config
        self.profiled = profiled
        self.running = Running()
        self.batched = BatchedUNet(self.unet, config.cache_branch, self.running, config.backend)
        self._peaks: dict[object, int] = {}
        self.capture: Capture = capture_cuda
        self._captured: Captured | None = None
        self._captured_key: object = None
        self.merging, self.transforming = Merging(self.unet, {}), Transforming(self.unet)
        self.is_open = False
        self.run: Run | None = None
        self.last_run: Run | None = None
        self.bank, self._bank_key, self._scale = self._build(), self._key(), 1.0

    def make_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A stand-in for the UNet's forward with the same signature."""
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            with torch.no_grad():
                return self(**bound.arguments)

        return forward

    def open(self) -> None:
        """Put the batched forward on the LoRA layers."""
        self.run, self.is_open = None, True
        self._unet_bytes = sum(int(p.nbytes) for p in self.unet.parameters())
        if self._device.type == "cpu":
            keep_freed_memory()
        self.merging, self.transforming = Merging(self.unet, {}), Transforming(self.unet)
        install(self.bank, self.running, self.config.backend)
        self._stack(self.config.memory_budget is None)  # with a budget, a run's strategy says

    def close(self) -> None:
        """Give the layers their own forward back."""
        self.is_open, self._captured = False, None
        self.transforming.switch(False)
        uninstall(self.unet)
        self.batched.stacked = {}

    def _stack(self, wanted: bool) -> None:
        """Have the copies of q, k and v, or not."""
        if wanted != bool(self.batched.stacked):
            self.merging.switch(False)
            stacked = stack_projections(self.unet, self.running, self.config.backend) if wanted else {}
            fill_stacked(stacked.values())
            self.batched.stacked, self.merging, self._captured = stacked, Merging(self.unet, stacked), None

    def refresh_bank(self, scale: float) -> None:
        """Take over what PEFT's layers hold now; stack them anew if adapters, ranks or the device changed."""
        key = self._key()
        if self._bank_key != key:
            self.bank, self._bank_key = self._build(), key
            self._peaks.clear()
            self.close()
            self.open()
        # always: PEFT's hot swap writes into a parameter in a way that leaves no trace
        fill_bank(self.bank, scale)
        for layer, _ in self.bank.layers:
            layer.forward.seen = None
        fill_stacked(self.batched.stacked.values())
        for projection in self.batched.stacked.values():
            projection.seen = None
        self._scale = scale
        self.merging.renew()
        self.transforming.renew()

    @property
    def adapter_bytes(self) -> int:
        """Memory of all that is stacked."""
        kept = sum(weights.bytes for weights in (self.merging, self.transforming) if weights.on)
        return self.bank.bytes + kept + sum(projection.bytes for projection in self.batched.stacked.values())

    @property
    def _device(self) -> torch.device:
        """Of the UNet; its own property looks for hooks in every module first, which takes milliseconds."""
        device: torch.device = next(self.unet.parameters()).device
        return device

    def strategies(self) -> dict[str, int]:
        """How many of the linear layers that carry adapters ran with which strategy of the kernels' cost model."""
        device = self._device
        triton = self.config.backend == "triton" or (self.config.backend == "auto" and device.type == "cuda")
        ran = list(problems(self.unet, self.batched.stacked))
        if not triton:
            merged = sum(layer.seen is not None for layer, _, _ in self.merging.layers) if self.merging.on else 0
            counts = {"merged": merged, "definition": len(ran) - merged}
            return {name: count for name, count in counts.items() if count}
        return dict(collections.Counter(tiles.choose(problem, arch_of(device)).strategy for problem in ran))

    def _key(self) -> tuple[object, ...]:
        return (fingerprint(self.unet), self._device)

    def _build(self) -> AdapterBank:
        names: tuple[str, ...] = ()
        if self.config.method != "no_lora":
            several = self.config.method != "merge"
            others = elsewhere(self._pipe())
            lenient = self._lenient
            names = choose_adapters(self.unet, self.config.adapters, several=several, elsewhere=others, lenient=lenient)
            measured = {*self.config.high, *self.config.low}
            if self.profiled and measured != {*names}:
                raise AdapterError(
                    f"high='auto' was settled for the adapters {', '.join(sorted(measured))}, which are now "
                    f"{', '.join(names)}; call cmlora.accelerate(pipe, high='auto', ...) again"
                )
            names = names if lenient else order_adapters(names, self.config)
        make_plan(self.config, names, 1)  # high and low must name adapters that take part
        ones: Recipe = tuple((name, 1.0) for name in names)
        recipes = (ones,) if self.config.method == "merge" else tuple((one,) for one in ones)
        return build_bank(self.unet, recipes, device=self._device, lenient=self._lenient)

    @property
    def _lenient(self) -> bool:
        """A merge of whatever is active is what the plain pipeline draws."""
        return self.config.method == "merge" and self.config.adapters is None

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **conditions: Any,
    ) -> Any:
        """One UNet evaluation of the pipeline, arguments as in UNet2DConditionModel.forward."""
        try:
            kwargs = dict(cross_attention_kwargs or {})
            device = sample.device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                raise RunError("torch.autocast is not supported: load the pipeline with torch_dtype=... instead")
            if "gligen" in kwargs:
                raise RunError("cross_attention_kwargs['gligen'] is not supported")
            scale = float(kwargs.pop("scale", 1.0))
            run = self._locate(sample, timestep, scale)
            inputs = Inputs(
                sample, timestep, encoder_hidden_states, cross_attention_kwargs=kwargs or None, **conditions
            )
            noise = self._step(run, inputs)
        except BaseException:
            self.run = None  # whatever went wrong, the next call starts afresh
            raise
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def _locate(self, sample: Tensor, timestep: Any, scale: float) -> Run:
        """The run that this call belongs to, found without reading a tensor: by where the timestep lies in memory."""
        timesteps, offset = self._position(timestep)
        run = self.run
        again = run is not None and run.timesteps is timesteps
        if again and run is not None and offset == run.position and len(run.plan) > 1:
            raise RunError(
                "the UNet was called twice for one timestep; cmlora needs one call per step with all guidance halves "
                "in one batch (a pipeline that calls it once per half, or twice per step, cannot be accelerated)"
            )
        if run is None or not again or offset <= run.position:
            self.refresh_bank(scale)
            run = self._start(sample, timesteps, offset)
        else:
            if scale != self._scale:
                self.refresh_bank(scale)
            if sample.shape != run.shape:
                run.shrink(sample)
        if offset != run.position + 1 and run.position >= 0:
            run.cache = None  # steps were left out: what they would have refreshed is missing
        run.position = offset
        self.run = self.last_run = run
        return run

    def _position(self, timestep: Any) -> tuple[Tensor, int]:
        timesteps = getattr(getattr(self._pipe(), "scheduler", self._scheduler), "timesteps", None)
        if (
            not isinstance(timestep, Tensor)
            or not isinstance(timesteps, Tensor)
            or timestep.untyped_storage()._cdata != timesteps.untyped_storage()._cdata
        ):
            raise RunError(
                "timestep must be an element of pipe.scheduler.timesteps (`for t in scheduler.timesteps`), so that "
                f"a step's position is known without reading the device; got {timestep!r}. Call set_timesteps of the "
                "scheduler of the pipeline that was accelerated and pass its elements on"
            )
        return timesteps, int(timestep.storage_offset() - timesteps.storage_offset())

    def _start(self, sample: Tensor, timesteps: Tensor, offset: int) -> Run:
        check_supported(self.unet)  # processors may have been exchanged since
        steps = timesteps.shape[0] - offset
        pipe = self._pipe()
        if getattr(pipe, "_denoising_end", None) is not None:  # SDXL's base leaves the last steps to a refiner
            steps = min(steps, getattr(pipe, "_num_timesteps", steps))
        plan = make_plan(self.config, self.bank.names, steps)
        run = Run(plan, timesteps, offset, halves_of(pipe, sample), sample.shape[0], sample.shape)
        for step in plan:  # what comes from the host is on the device before the first step
            run.rows_of(step, tuple(range(len(step.slots))), sample.device)
            if step.refresh:
                run.rows_of(step, step.refresh, sample.device)
        return run

    def _strategy(self, run: Run, inputs: Inputs) -> Strategy:
        """What a run that begins spends memory on."""
        most, budget = self.config.max_rows, self.config.memory_budget
        if most is not None and most < run.images:
            raise RunError(
                f"max_rows must be at least the {run.images} rows (guidance halves x images) of the pipeline's own "
                f"batch, which run together; got {most}"
            )
        run.footprint = RunShape.of(inputs, run.plan, run.halves)
        predictions = max(len(step.slots) for step in run.plan)
        at_once = None if most is None else most // run.images
        candidates = strategies(predictions, at_once, merge=self._may_merge, transform=self._may_transform)
        if budget is None:
            self.merging.switch(candidates[0].merge)
            self.transforming.switch(candidates[0].transform)
            return candidates[0]
        if not predictable(self.unet):
            raise RunError("memory_budget needs a UNet without hooks and attention processors of one's own")
        strategy = choose(candidates, lambda candidate: self._peak(run, candidate), budget)
        self._stack(strategy.stack)
        self.batched.keep_prompt = strategy.keep_prompt
        self.merging.switch(strategy.merge)
        self.transforming.switch(strategy.transform)
        return strategy

    @property
    def _may_merge(self) -> bool:
        """On the CPU low-rank updates cost many small operations; merged weights none, up to the UNet's own size."""
        if self.config.merge_weights is not None:
            return self.config.merge_weights
        if self._device.type != "cpu" or self.config.backend == "triton":
            return False
        if any(weight.dtype != torch.float32 for _, weight, _ in self.merging.layers):
            return False  # rounded to W's few bits, W + s B A loses much of what the adapter adds
        return self.merging.bytes <= self._unet_bytes

    @property
    def _may_transform(self) -> bool:
        """On the CPU it saves up to half of a convolution's time; all that is kept is at most twice the UNet's size."""
        if not self.transforming.layers:
            return False
        if self.config.winograd is not None:
            return self.config.winograd
        if self._device.type != "cpu":
            return False
        kept = self.transforming.bytes + (self.merging.bytes if self._may_merge else 0)
        return kept <= 2 * self._unet_bytes

    def predicted_peak(self) -> int | None:
        """Bytes that the last run takes beside the pipeline's weights; None where that cannot be told."""
        run = self.last_run
        if run is None or run.strategy is None or not self.is_open or not predictable(self.unet):
            return None
        return self._peak(run, run.strategy)

    def _peak(self, run: Run, strategy: Strategy) -> int:
        assert run.footprint is not None
        key = (run.footprint.key, strategy)
        if key not in self._peaks:
            self.transforming.switch(strategy.transform)  # tiles are traced as they run
            options = ((self.merging, strategy.merge), (self.transforming, strategy.transform))
            kept = sum(weights.bytes for weights, wanted in options if wanted)
            self._peaks[key] = self.bank.bytes + kept + peak_of_run(self.batched, run.footprint, strategy)
        return self._peaks[key]

    def _step(self, run: Run, inputs: Inputs) -> Tensor:
        index = run.position - run.first
        if index >= len(run.plan):
            # another pipeline runs this UNet, not the one whose denoising_end set the length
            run.plan = make_plan(self.config, self.bank.names, run.timesteps.shape[0] - run.first)
            run.conditions = None
        step = run.plan[index]
        if run.strategy is None:
            run.strategy = self._strategy(run, inputs)
        gate = self._choose(run, step, inputs.sample, index)
        everyone = run.rows_of(step, tuple(range(len(step.slots))), inputs.sample.device)
        full = step.full or run.cache is None
        deep = everyone if full else run.deep_rows(step, inputs.sample.device)
        run.watch_halves(inputs.sample)
        timesteps = run.timesteps[run.first : run.first + len(run.plan)]
        weights = run.weights if len(step.slots) > 1 else None
        # the base model is the last prediction
        follow = self.config.cache_follow and BASE in step.slots and len(step.slots) - 1 in step.refresh
        cache = None if full else run.cache
        run.cache = None  # let go of before its successor is made
        captured = self._captured_steps(run, inputs)
        if captured is not None:
            if not captured.holds(run.conditions, inputs):
                run.conditions = captured.begin(inputs, everyone, timesteps)
            noise, run.cache = captured.step(inputs, index, everyone, deep, cache, weights, follow)
        else:
            run.conditions = self.batched.prepare(inputs, everyone, run.conditions, timesteps)
            at_once = run.strategy.at_once
            noise, run.cache = self.batched.run(inputs, everyone, deep, cache, run.conditions, index, at_once, follow)
            if weights is not None:
                noise = combine_noise(noise, weights, backend=self.config.backend)
        assert run.conditions is not None
        held = run.dominant if step.gated else step.early
        halves = 2 if getattr(self._pipe(), "do_classifier_free_guidance", False) and run.images % 2 == 0 else 1
        size = run.cache.nbytes + run.conditions.bytes
        run.record.append(Record(step, run.images, halves, full, held, gate, size))
        return noise

    def _captured_steps(self, run: Run, inputs: Inputs) -> Captured | None:
        """The captured steps that fit this one, new ones where anything that they rest on has changed; None: eager."""
        if not self.config.cuda_graphs:
            return None
        if run.capturable is None:
            run.capturable = self._capturable(run)
        if not run.capturable or inputs.cross_attention_kwargs is not None:
            return None
        key = (run.capturable, inputs.signature())
        if self._captured is None or self._captured_key != key:
            assert run.strategy is not None
            self._captured = Captured(self.batched, inputs, run.strategy.at_once, self.capture)
            self._captured_key = key
        return self._captured

    def _capturable(self, run: Run) -> tuple[object, ...]:
        """All that is baked into a captured step beside its inputs; () where it cannot be captured."""
        unet = self.unet
        if self.capture is capture_cuda and unet.device.type != "cuda":
            raise RunError(f"cuda_graphs=True needs a pipeline on a CUDA device, got one on {unet.device}")
        if not predictable(unet) or unet.encoder_hid_proj is not None:
            return ()
        freeu = tuple(getattr(block, name, None) for block in unet.up_blocks for name in ("s1", "s2", "b1", "b2"))
        weights = tuple(p.data_ptr() for p in unet.parameters())
        processors = tuple(map(id, unet.attn_processors.values()))
        return (run.halves, run.strategy, freeu, processors, weights)

    def _choose(self, run: Run, step: Step, sample: Tensor, index: int) -> Tensor | None:
        """Weights per prediction and image, the dominant adapter where the device decides; returns the gate's m."""
        config, gate = self.config, None
        adapters = sum(slot >= 0 for slot in step.slots)
        latents = sample[:, : self.unet.config.out_channels]  # an inpainting UNet's input carries the mask behind them
        if step.gated and step.rotate:
            assert step.early is not None
            assert step.late is not None
            run.dominant, weights, gate = dominant_from_latents(
                latents,
                config.online_cutoff,
                config.online_gate,
                step.early,
                step.late,
                adapters,
                step.dominant_coefficient,
                step.other_coefficient,
                backend=config.backend,
            )
            run.weights = with_base(weights, step)
        elif run.weights is None or (step.rotate and not step.gated):
            weights = torch.full((adapters, run.images), step.other_coefficient, device=sample.device)
            if step.early is not None:
                weights[step.early] = step.dominant_coefficient
            run.weights = with_base(weights, step)
        if gate is None and config.method == "cmlora" and config.partition == "online" and index > 0:
            gate = high_frequency_share(latents, config.online_cutoff, backend=config.backend)  # for the summary
        return gate
