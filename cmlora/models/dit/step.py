"""One step of a transformer as one batch: the first blocks for all rows, the middle ones for those that are refreshed.

A transformer has no skip connections, so what is cached is what the deep blocks add: R = h_tail - h_head of every row,
its text and image tokens as one sequence. In between, R is added to what the head makes of the step's own latents. A
family says how its tokens begin, how one block runs and how they end (`BatchedTransformer`); nothing here knows a
model's blocks.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmlora.batch.inputs import Inputs
from cmlora.batch.rows import Rows, Shared, grid, lift, pick, whole
from cmlora.batch.running import Around, Running
from cmlora.config import CMLoRAConfig
from cmlora.errors import ConfigError
from cmlora.lora.bank import outline
from cmlora.lora.layers import carrying, untouched
from cmlora.lora.stacked import StackedProjection
from cmlora.models.family import Batched, Conditions
from cmlora.models.prompts import by_prediction

State = tuple[Shared, ...]
"""Tokens between two blocks: text and image apart, or both as one sequence."""


@dataclass(kw_only=True)
class TransformerInputs(Inputs):
    """What every transformer is given.

    Attributes:
        size: height and width of the image in tokens.
        encoder_hidden_states: [own rows, text tokens, width] the prompt.
        prompts: by prediction, where predictions have prompts of their own: None for the pipeline's, else tensors by
            the names of these fields.
    """

    size: tuple[int, int]
    encoder_hidden_states: Tensor
    prompts: tuple[dict[str, Tensor] | None, ...] | None = None

    CONSTANT: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "prompts")

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), self.size)


I = TypeVar("I", bound=TransformerInputs)  # noqa: E741


class TransformerConditions(Conditions):
    """The prompt's tokens and the positions of all tokens, made once for a run.

    Args:
        batched: whose they are. inputs: of a step of the run.
    """

    def __init__(self, batched: BatchedTransformer[Any], inputs: Any) -> None:
        super().__init__(inputs)
        self.batched = batched
        self.prompts = inputs.prompts
        self.carrying = carrying(batched.module)
        self.positions: tuple[Tensor, ...] = batched.positions(inputs)
        self.plain: frozenset[nn.Module] = batched.plain_blocks()
        self._texts: dict[tuple[int, ...], tuple[Tensor, Rows]] = {}

    def renew(self, inputs: Any, everyone: Rows, timesteps: Tensor) -> None:
        for mine, now in zip(self.positions, self.batched.positions(inputs), strict=True):
            mine.copy_(now)
        for kept, rows in self._texts.values():
            kept.copy_(self._encode(inputs, rows))

    def text(self, inputs: Any, rows: Rows, everyone: Rows) -> Shared:
        """Embedded tokens of the prompt: of the pipeline's own rows where no adapter changes them."""
        key = () if self._text_is_shared else everyone.known
        if key not in self._texts:
            self._texts[key] = self._encode(inputs, everyone), everyone
        kept = self._texts[key][0]
        return Shared(kept, False, True) if self._text_is_shared else Shared(pick(kept, rows.index), True, True)

    @property
    def _text_is_shared(self) -> bool:
        return self.prompts is None and not self.batched.text_embedders() & self.carrying

    def _encode(self, inputs: Any, everyone: Rows) -> Tensor:
        """Of the pipeline's own rows, or of everyone's."""
        running = self.batched.running
        with running.these(everyone), running.at(None):
            return self.batched.embed_text(self, inputs, None if self._text_is_shared else everyone)

    def given(self, name: str, inputs: Any, everyone: Rows | None) -> Tensor:
        """[all rows, ...] an input that predictions have one of their own of, where they do; None: own rows."""
        own: Tensor = self.batched.prompt(inputs) if name == "encoder_hidden_states" else getattr(inputs, name)
        if own.shape[0] == 1:  # of one prompt for several images, which modulation spreads in diffusers' blocks
            own = own.expand(inputs.sample.shape[0], *own.shape[1:])
        if self.prompts is not None and everyone is not None:
            return by_prediction(own, [None if p is None else p[name] for p in self.prompts], everyone)
        return spread(own, everyone)

    @property
    def bytes(self) -> int:  # type: ignore[override]  # computed where the base class has a constant
        """Memory of what is kept for the run."""
        return sum(t.nbytes for t in self.positions) + sum(kept.nbytes for kept, _ in self._texts.values())


class BatchedTransformer(Batched[I, TransformerConditions]):
    """Steps of one transformer; the cache branch says how many blocks at either end run for all rows in every step.

    Attributes:
        blocks: all of them, in order.
        text_first: whether text comes before the image where both are one sequence.

    Raises:
        ConfigError: a branch that the transformer does not have.
    """

    text_first: ClassVar[bool] = True

    def __init__(self, module: Any, config: CMLoRAConfig, running: Running) -> None:
        super().__init__(module, config, running)
        self.blocks: list[Any] = self.list_blocks()
        self.residual = config.cache_interval != 1
        self.first, self.last = cut_of(len(self.blocks), config.cache_branch, cached=self.residual)

    @abstractmethod
    def list_blocks(self) -> list[Any]:
        """All blocks, in order."""

    @abstractmethod
    def positions(self, inputs: I) -> tuple[Tensor, ...]:
        """What the blocks are told of the tokens' positions, for all rows and steps of a run."""

    @abstractmethod
    def text_embedders(self) -> set[nn.Module]:
        """The modules of `embed_text`."""

    @abstractmethod
    def embed_text(self, conditions: TransformerConditions, inputs: I, rows: Rows | None) -> Tensor:
        """[rows, text tokens, width] of the prompt; None: of the pipeline's own rows."""

    def prompt(self, inputs: I) -> Tensor:
        """[own rows, text tokens, width] the pipeline's prompt."""
        return inputs.encoder_hidden_states

    @abstractmethod
    def embed_time(self, part: TransformerPart) -> Shared:
        """[rows, width] what the blocks are modulated with."""

    @abstractmethod
    def embed_image(self, part: TransformerPart) -> Shared:
        """[rows, image tokens, width]."""

    @abstractmethod
    def block(self, part: TransformerPart, index: int, state: State) -> State:
        """Through one block."""

    @abstractmethod
    def finish(self, part: TransformerPart, image: Tensor) -> Tensor:
        """[rows, ...] predictions from the image's tokens behind the last block."""

    def plain_blocks(self) -> frozenset[nn.Module]:
        """The blocks that may be computed without calling them."""
        return frozenset()

    def stack(self) -> dict[nn.Module, StackedProjection]:
        return {}  # copies of q, k, v are a sixth of the model, whose GEMMs gain little from fewer launches

    def begin(self, inputs: I, timesteps: Tensor) -> TransformerConditions:
        return TransformerConditions(self, inputs)

    def part(
        self, inputs: I, conditions: TransformerConditions, rows: Rows, everyone: Rows, step: int
    ) -> TransformerPart:
        return TransformerPart(self, inputs, conditions, rows, everyone)

    def feature_map(self, cache: Tensor, inputs: I) -> Tensor:
        image = cache[:, self.places(inputs)] if self.last else cache
        return image.transpose(1, 2).reshape(image.shape[0], -1, *inputs.size)

    def around(self, inputs: I) -> Around:
        """Tokens before and behind the places, of sequences that have others, too; that of all tokens comes last."""
        text = self.text_tokens(inputs)
        return ((text, 0) if self.text_first else (0, text),)

    def text_tokens(self, inputs: I) -> int:
        """How many there are."""
        return inputs.encoder_hidden_states.shape[1]

    def places(self, inputs: I) -> slice:
        """The image's tokens in the sequence of both."""
        before, (height, width) = self.around(inputs)[-1][0], inputs.size
        return slice(before, before + height * width)

    def predictable(self) -> bool:
        return untouched(self.module) and {type(p).__module__.split(".")[0] for p in self._processors()} <= {
            "diffusers"
        }

    def baked(self) -> tuple[object, ...] | None:
        return tuple(map(id, self._processors())) if self.predictable() else None

    def _processors(self) -> list[Any]:
        return [p for _, module in outline(self.module) if (p := getattr(module, "processor", None)) is not None]


class TransformerPart:
    """Some rows on their way through a transformer in one step."""

    def __init__(
        self,
        batched: BatchedTransformer[Any],
        inputs: Any,
        conditions: TransformerConditions,
        rows: Rows,
        everyone: Rows,
    ) -> None:
        self.batched, self.module = batched, batched.module
        self.inputs, self.conditions = inputs, conditions
        self.rows, self.everyone = rows, everyone
        self.temb: Shared = Shared(inputs.timestep, False, True)  # until it is embedded

    @functools.cached_property
    def activated(self) -> Shared:
        """silu of `temb`, once for all blocks."""
        return Shared(F.silu(self.temb.value), self.temb.by_prediction, self.temb.by_half)

    def head(self) -> tuple[Shared, list[Shared]]:
        batched = self.batched
        self.temb = batched.embed_time(self)
        with self._at():
            state = (self.conditions.text(self.inputs, self.rows, self.everyone), batched.embed_image(self))
            hidden = self.joined(self._through(0, batched.first, state))
        return hidden, [self.temb, hidden] if batched.residual else [self.temb]

    def deep(self, hidden: Shared, kept: Sequence[Shared]) -> Tensor:
        batched = self.batched
        self.temb = batched.embed_time(self) if kept[0].by_prediction else kept[0]
        with self._at():
            end = len(batched.blocks) - batched.last
            out = whole(self.joined(self._through(batched.first, end, (hidden,))), self.rows)
        before = whole(hidden, self.rows)
        if not batched.last:  # nothing behind reads the text
            out, before = out[:, batched.places(self.inputs)], before[:, batched.places(self.inputs)]
        return out - before if batched.residual else out

    def tail(self, feature: Tensor, kept: Sequence[Shared]) -> Tensor:
        batched = self.batched
        self.temb = kept[0]
        image = feature
        if batched.residual:
            before = whole(kept[1], self.rows)
            image = (before if batched.last else before[:, batched.places(self.inputs)]) + feature
        with self._at():
            if batched.last:
                count = len(batched.blocks)
                state = self._through(count - batched.last, count, (Shared(image, True, True),))
                image = whole(self.apart(state)[1], self.rows)
            return batched.finish(self, image)

    def _through(self, first: int, end: int, state: State) -> State:
        for index in range(first, end):
            state = self.batched.block(self, index, state)
        return state

    def _at(self) -> Any:
        return self.batched.running.at(self.inputs.size, self.batched.around(self.inputs))

    def joined(self, state: State) -> Shared:
        """Text and image as one sequence."""
        if len(state) == 1:
            return state[0]
        text, image = alike(self.rows, *state)
        both = (text, image) if self.batched.text_first else (image, text)
        return Shared(torch.cat([x.value for x in both], 1), text.by_prediction, text.by_half)

    def apart(self, state: State) -> tuple[Shared, Shared]:
        """Text, and image; views of one sequence."""
        if len(state) == 2:
            return state
        x, places = state[0], self.batched.places(self.inputs)
        text = x.value[:, : places.start] if self.batched.text_first else x.value[:, places.stop :]
        image = x.value[:, places]
        return Shared(text, x.by_prediction, x.by_half), Shared(image, x.by_prediction, x.by_half)

    def run(self, module: Any, x: Shared) -> Shared:
        """A module on `x`, with a row per prediction if an adapter changes it."""
        x = lift(x, self.rows, by_prediction=True) if module in self.conditions.carrying else x
        return Shared(module(x.value), x.by_prediction, x.by_half)

    def rows_for(self, module: nn.Module, *xs: Shared) -> list[Shared]:
        """What a module takes, with rows alike: of every prediction only if an adapter changes it or one of them."""
        apart = module in self.conditions.carrying or any(x.by_prediction for x in xs)
        return [lift(x, self.rows, by_prediction=apart, by_half=True) for x in xs]

    def add_own(self, x: Shared, residual: Tensor) -> Shared:
        """Add [own rows, ...], or [1, ...] for all: ControlNet's."""
        return fused(self.rows, torch.add, x, Shared(residual, False, True))


def spread(own: Tensor, rows: Rows | None) -> Tensor:
    """[own rows, ...] for all rows; None: as it is."""
    return own if rows is None else whole(Shared(own, False, True), rows)


def alike(rows: Rows, *xs: Shared) -> list[Shared]:
    """All with rows for what differs in any."""
    p, q = any(x.by_prediction for x in xs), any(x.by_half for x in xs)
    return [lift(x, rows, by_prediction=p, by_half=q) for x in xs]


def fused(rows: Rows, work: Callable[..., Tensor], *xs: Shared) -> Shared:
    """Elementwise work on tensors [rows, ...], with rows for what differs in any of them; nothing is repeated."""
    p, q = any(x.by_prediction for x in xs), any(x.by_half for x in xs)
    counts = {x.value.shape[0] for x in xs} - {1}
    if len(counts) <= 1:
        return Shared(work(*(x.value for x in xs)), p, q)
    return Shared(work(*(_gridded(x, rows) for x in xs)).flatten(0, 2), p, q)


def _gridded(x: Shared, rows: Rows) -> Tensor:
    return x.value[None, None] if x.value.shape[0] == 1 else grid(x, rows)


def cut_of(blocks: int, branch: tuple[int, int] | None, *, cached: bool) -> tuple[int, int]:
    """How many blocks at the beginning and at the end run in every step.

    By default an eighth of them at the beginning and half as many at the end, one at least; none without a cache.
    """
    if not cached:
        return 0, 0
    if branch is None:
        first = max(1, blocks // 8) if blocks > 1 else 0
        return first, min(max(1, blocks // 16), blocks - first - 1) if first else 0
    if sum(branch) >= blocks:
        raise ConfigError(
            f"cache_branch must be the blocks (first, last) of {blocks} that run in every step, and leave one to be "
            f"cached; got {branch}"
        )
    return branch
