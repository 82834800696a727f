"""What runs of one accelerated module spend memory on, and what for: its one owner.

Stacked adapters, copies of q, k and v, merged and transformed weights, captured steps; what a run may have of them, and
the peak that follows.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cmlora.batch.inputs import Inputs
from cmlora.batch.running import Running
from cmlora.config import CMLoRAConfig, Recipe
from cmlora.engine.budget import Strategy, candidates, first_that_fits
from cmlora.engine.footprint import Traced, keep_freed_memory, trace_run
from cmlora.engine.graphs import Capture, Captured, CudaCapture, forgiving
from cmlora.engine.run import Lane, Run
from cmlora.errors import RunError
from cmlora.lora.bank import AdapterBank, build_bank, fill_bank
from cmlora.lora.layers import install, uninstall
from cmlora.lora.merged import Merging
from cmlora.lora.stacked import StackedProjection, fill_stacked, problems
from cmlora.lora.winograd import Transforming
from cmlora.models.family import Batched
from cmlora_kernels.cards import chip
from cmlora_kernels.costs import choose
from cmlora_kernels.dispatch import why_not
from cmlora_kernels.launch import arch_of

HOST_SECONDS = 1e-5
"""Of an operation, eager: dispatcher and module of torch's, op call and launch of ours. A guess on the low side."""


def waits_for_host(traced: Traced, target: str, dtype: torch.dtype) -> bool:
    """Whether the host is predicted to take more than half of the device's time; both from counts."""
    known = chip(target)
    device = traced.moved / known.bandwidth + traced.flops / known.library(2 if dtype.itemsize == 2 else 4)
    return traced.launches * HOST_SECONDS > 0.5 * device


def free_bytes(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device: what the driver has left, and what torch holds in reserve; nothing waits for the device."""
    if device.type != "cuda":
        return 0, 0
    free, _ = torch.cuda.mem_get_info(device)
    return free, torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class Spending:
    """Holds what was spent, from `open` to `close`.

    Args:
        batched: the module's way to run steps.
        config: for its limits and wishes.
    """

    def __init__(self, batched: Batched[Any, Any], config: CMLoRAConfig) -> None:
        self.batched, self.config = batched, config
        self.module: nn.Module = batched.module
        self.running: Running = batched.running
        self.bank = AdapterBank((), (), (), ())
        self.merging, self.transforming = self._merging({}), Transforming(self.module)
        self.is_open = False
        self.capture: Capture = CudaCapture()
        self.captured: dict[int, tuple[object, Captured]] = {}  # by lane: what it rests on, and it
        self._peaks: dict[object, tuple[int, Traced]] = {}
        self._module_bytes = 0

    @property
    def device(self) -> torch.device:
        """Of the module; its own property looks for hooks in every module first, which takes milliseconds."""
        device: torch.device = next(self.module.parameters()).device
        return device

    def build(self, recipes: Sequence[Recipe], *, lenient: bool) -> AdapterBank:
        """The stacked adapters of a run's slots; nothing is put in force."""
        return build_bank(self.module, recipes, device=self.device, lenient=lenient)

    def open(self, bank: AdapterBank) -> None:
        """Put the batched forward on the LoRA layers of `bank`."""
        self.bank, self.is_open = bank, True
        self._peaks.clear()
        self._module_bytes = sum(int(p.nbytes) for p in self.module.parameters())
        if self.device.type == "cpu":
            keep_freed_memory()
        self.merging, self.transforming = self._merging({}), Transforming(self.module)
        install(bank, self.running, self.config.backend, self.batched.placeless())
        self._stack(self.config.memory_budget is None)  # with a budget, a run's strategy says

    def close(self) -> None:
        """Give the layers their own forward back, and the memory."""
        self.is_open = False
        self.captured.clear()
        self.transforming.switch(False)
        uninstall(self.module)
        self.batched.stacked = {}

    def renew(self, scale: float) -> None:
        """Take over what PEFT's layers and their base layers hold now, times a scale."""
        # always: PEFT's hot swap writes into a parameter in a way that leaves no trace
        fill_bank(self.bank, scale)
        for layer, _ in self.bank.layers:
            layer.forward.seen = None
        fill_stacked(self.batched.stacked.values())
        for projection in self.batched.stacked.values():
            projection.seen = None
        self.merging.renew()
        self.transforming.renew()

    def strategy(self, run: Run, lane: Lane, inputs: Inputs) -> Strategy:
        """What a run that begins spends memory on; put in force."""
        most, budget = self.config.max_rows, self.config.memory_budget
        if most is not None and most < lane.own:
            raise RunError(
                f"max_rows must be at least the {lane.own} rows (guidance halves x images) of the pipeline's own "
                f"batch, which run together; got {most}"
            )
        predictions = max(len(kind.slots) for step in run.plan for kind in (step, step.probe or step))
        at_once = 1 if lane.apart else None if most is None else most // lane.own
        options = candidates(predictions, at_once, merge=self.may_merge, transform=self.may_transform)
        if budget is None:
            strategy = options[0]
        elif not self.batched.predictable():
            raise RunError("memory_budget needs a model without hooks and attention processors of one's own")
        else:
            strategy = first_that_fits(
                options, lambda s: self._peak(lane, s, graphs=self.config.cuda_graphs is True), budget
            )
            self._stack(strategy.stack)
            self.batched.keep_prompt = strategy.keep_prompt
        if strategy.merge != self.merging.on:
            self.captured.clear()  # they read weights that come or go
            self.merging.switch(strategy.merge)
        self.transforming.switch(strategy.transform)
        return strategy

    def _stack(self, wanted: bool) -> None:
        """Have the copies of q, k and v, or not."""
        if wanted != bool(self.batched.stacked):
            self.merging.switch(False)
            stacked = self.batched.stack() if wanted else {}
            fill_stacked(stacked.values())
            self.batched.stacked, self.merging = stacked, self._merging(stacked)
            self.captured.clear()

    def _merging(self, stacked: Mapping[nn.Module, StackedProjection]) -> Merging:
        """A merge needs one weight per layer; on the CPU convolutions are Winograd's business unless asked for."""
        convolutions = self.device.type != "cpu" or bool(self.config.merge_weights)
        return Merging(self.module, stacked, alone=self.config.method == "merge", convolutions=convolutions)

    @property
    def may_merge(self) -> bool:
        """Whether merged weights are an option: where they save time, and memory is there for them.

        On the CPU low-rank updates cost many small operations, merged weights none, up to the module's own size. On a
        GPU a weight that all rows share is the library's GEMM, as the plain pipeline's; one per row was not measured.
        """
        if self.config.method == "routed":
            return False  # its adapters have a weight per token
        if self.config.merge_weights is not None:
            return self.config.merge_weights
        if self.config.backend == "triton":
            return False
        if self.device.type != "cpu":
            own = self.merging.bytes if self.merging.on else 0
            return self.merging.alone and self.merging.bytes <= (sum(free_bytes(self.device)) + own) // 2
        if any(weight.dtype != torch.float32 for _, weight, _ in self.merging.layers):
            return False  # not measured
        return self.merging.bytes <= self._module_bytes

    @property
    def may_transform(self) -> bool:
        """On the CPU it saves up to half of a convolution's time; all that is kept is at most twice the module's."""
        if not self.transforming.layers:
            return False
        if self.config.winograd is not None:
            return self.config.winograd
        if self.device.type != "cpu":
            return False
        kept = self.transforming.bytes + (self.merging.bytes if self.may_merge else 0)
        return kept <= 2 * self._module_bytes

    @property
    def adapter_bytes(self) -> int:
        """Memory of all that is stacked, merged and transformed."""
        kept = sum(weights.bytes for weights in (self.merging, self.transforming) if weights.on)
        return self.bank.bytes + kept + sum(projection.bytes for projection in self.batched.stacked.values())

    def predicted_peak(self, run: Run | None) -> int | None:
        """Bytes that a run takes beside the pipeline's weights; None where that cannot be told.

        Guidance halves that are called one by one have caches and conditions of their own: those of all but one are
        added as they were measured.
        """
        if run is None or run.strategy is None or not self.is_open or not self.batched.predictable():
            return None
        first, *others = run.lanes
        kept = sum(max((record.cache_bytes for record in lane.record), default=0) for lane in others)
        return self._peak(first, run.strategy, graphs=bool(first.capturable)) + kept

    def _peak(self, lane: Lane, strategy: Strategy, *, graphs: bool) -> int:
        assert lane.footprint is not None
        key = (lane.footprint.key, strategy)
        if key not in self._peaks:
            self.transforming.switch(strategy.transform)  # tiles are traced as they run
            options = ((self.merging, strategy.merge), (self.transforming, strategy.transform))
            kept = sum(weights.bytes for weights, wanted in options if wanted)
            traced = trace_run(self.batched, lane.footprint, strategy)
            self._peaks[key] = (self.bank.bytes + kept, traced)
        beside, traced = self._peaks[key]
        # captured steps have a pool of their own, beside the blocks that torch keeps of their first occurrence
        return beside + traced.peak * (2 if graphs else 1)

    def _worth_capturing(self, run: Run, lane: Lane) -> bool:
        """For cuda_graphs="auto": whether the host is what a run waits for, as predicted, and a pool of steps fits."""
        strategy = run.strategy
        if self.device.type != "cuda" or strategy is None or lane.footprint is None or not self.batched.predictable():
            return False
        wanted = self._peak(lane, strategy, graphs=True)
        if self.config.memory_budget is not None and wanted > self.config.memory_budget:
            return False
        _, traced = self._peaks[lane.footprint.key, strategy]
        free, reserve = free_bytes(self.device)
        # the pool takes nothing from torch's reserve, the first occurrence of a step does
        fits = traced.peak + max(0, traced.peak - reserve) < free
        return fits and waits_for_host(traced, arch_of(self.device), lane.footprint.inputs.sample.dtype)

    def layer_strategies(self) -> dict[str, int]:
        """How many of the linear layers that carry adapters ran with which strategy of the kernels' cost model."""
        ran = list(problems(self.module, self.batched.stacked))
        merged = sum(layer.seen is not None for layer, _, _ in self.merging.layers) if self.merging.on else 0
        counts: collections.Counter[str] = collections.Counter(merged=merged)
        of_layers = {id(layer) for layer, _, _ in self.merging.layers} if self.merging.on else set()
        arch, backend = arch_of(self.device), self.config.backend
        triton = backend == "triton" or (backend == "auto" and self.device.type == "cuda" and not why_not(arch))
        for layer, problem in ran:
            if id(layer) not in of_layers:
                counts[choose(problem, arch).strategy if triton else "definition"] += 1
        return {name: count for name, count in counts.items() if count}

    def captured_steps(self, run: Run, lane: Lane, inputs: Inputs) -> Captured | None:
        """The captured steps that fit this one, new ones where anything that they rest on has changed; None: eager."""
        if not self.config.cuda_graphs:
            return None
        if lane.capturable is None:
            worth = self.config.cuda_graphs is True or self._worth_capturing(run, lane)
            lane.capturable = self._capturable(run, lane) if worth else ()
        if not lane.capturable or inputs.settings() is not None:
            return None
        key, number = (lane.capturable, inputs.signature()), run.lanes.index(lane)
        if number not in self.captured or self.captured[number][0] != key:
            assert run.strategy is not None
            self.captured[number] = (key, Captured(self.batched, inputs, run.strategy.at_once, self._make_capture()))
        return self.captured[number][1]

    def _make_capture(self) -> Capture:
        """As asked for with cuda_graphs=True; with "auto" what cannot be captured runs as it is."""
        return self.capture if self.config.cuda_graphs is True else forgiving(self.capture)

    def _capturable(self, run: Run, lane: Lane) -> tuple[object, ...]:
        """All that is baked into a captured step beside its inputs; () where it cannot be captured."""
        if isinstance(self.capture, CudaCapture) and self.device.type != "cuda":
            raise RunError(f"cuda_graphs=True needs a pipeline on a CUDA device, got one on {self.device}")
        baked = self.batched.baked()
        if baked is None:
            return ()
        return (lane.halves, run.strategy, baked, tuple(p.data_ptr() for p in self.module.parameters()))
