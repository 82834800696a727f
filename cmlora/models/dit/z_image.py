"""ZImageTransformer2DModel: refiners of either stream, then blocks of one; both guidance halves in one call.

Pipelines pass lists, a tensor per row, the conditional half first; here rows are one tensor and that half is the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from cmlora.batch.rows import Rows, Shared, whole
from cmlora.batch.running import Around, Running
from cmlora.config import CMLoRAConfig
from cmlora.errors import ConfigError, RunError, UnsupportedModelError
from cmlora.models.caller import calling_frame
from cmlora.models.dit.family import TransformerFamily, layers_in
from cmlora.models.dit.step import (
    BatchedTransformer,
    State,
    TransformerConditions,
    TransformerInputs,
    TransformerPart,
    spread,
)
from cmlora.models.family import Call

PATCH, EMBEDDER = 2, "2-1"
MULTIPLE: int = SEQ_MULTI_OF


@dataclass(kw_only=True)
class ZImageInputs(TransformerInputs):
    """`sample` [own rows, channels, height, width]; the prompt is a tensor [tokens, width] per row.

    Attributes:
        turned: whether the halves came the other way round.
        controlnet_block_samples: [own rows, all tokens, width] by block.
    """

    turned: bool = False
    controlnet_block_samples: dict[int, Tensor] | None = None

    def settings(self) -> object:
        return self.size, self.turned

    def last(self, rows: int) -> ZImageInputs:
        own = self.sample.shape[0]
        given = self.controlnet_block_samples
        return replace(
            self,
            sample=self.sample[own - rows :],
            timestep=self.timestep[self.timestep.shape[0] - rows :],
            encoder_hidden_states=self.encoder_hidden_states[own - rows :],
            controlnet_block_samples=given and {i: x[own - rows :] for i, x in given.items()},
        )


class BatchedZImage(BatchedTransformer[ZImageInputs]):
    """Steps of one ZImageTransformer2DModel; its blocks are called as they are, the refiners before the first one."""

    text_first = False

    def list_blocks(self) -> list[Any]:
        return [*self.module.layers]

    def text_tokens(self, inputs: ZImageInputs) -> int:
        return _padded(max(len(prompt) for prompt in inputs.encoder_hidden_states))

    def padding(self, inputs: ZImageInputs) -> int:
        """Tokens that fill up the image's."""
        height, width = inputs.size
        return _padded(height * width) - height * width

    def around(self, inputs: ZImageInputs) -> Around:
        padding = self.padding(inputs)
        return (0, padding), (0, padding + self.text_tokens(inputs))

    def prompt(self, inputs: ZImageInputs) -> Tensor:
        count, prompts = self.text_tokens(inputs), inputs.encoder_hidden_states
        return torch.stack([torch.cat([p, p[-1:].expand(count - len(p), -1)]) for p in prompts])

    def positions(self, inputs: ZImageInputs) -> tuple[Tensor, ...]:
        """[own rows, tokens, ...]: turns of the text and of all, which tokens of the text are there, and filled up."""
        count, device = self.text_tokens(inputs), inputs.sample.device
        (height, width), padding = inputs.size, self.padding(inputs)
        texts, images = [], []
        lengths = [len(prompt) for prompt in inputs.encoder_hidden_states]
        for length in map(_padded, lengths):
            texts.append(_grid(self.module, (count, 1, 1), (1, 0, 0), device))
            image = _grid(self.module, (1, height, width), (length + 1, 0, 0), device)
            images.append(torch.cat([image, image.new_zeros(padding, 3)]))
        ids = torch.stack([torch.cat(both) for both in zip(images, texts, strict=True)])
        if isinstance(inputs.sample, FakeTensor):  # the embedder keeps what it has made, which must not be one of these
            half = sum(self.module.axes_dims) // 2
            turns = ids.new_empty(*ids.shape[:2], half, dtype=torch.complex64)
        else:
            turns = self.module.rope_embedder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        at = torch.arange(count, device=device)
        here = torch.stack([at < _padded(length) for length in lengths])
        filled = torch.stack([at >= length for length in lengths])
        return turns[:, height * width + padding :].clone(), turns, here, filled

    def text_embedders(self) -> set[nn.Module]:
        return {self.module.cap_embedder, *self.module.context_refiner}

    def embed_text(self, conditions: TransformerConditions, inputs: ZImageInputs, rows: Rows | None) -> Tensor:
        turns, _, here, filled = (spread(p, rows) for p in conditions.positions)
        text = self.module.cap_embedder(conditions.given("encoder_hidden_states", inputs, rows))
        text = torch.where(filled[..., None], self.module.cap_pad_token, text)
        mask = here if self._ragged(inputs) else None
        for block in self.module.context_refiner:
            text = block(text, mask, turns)
        kept: Tensor = torch.where(here[..., None], text, 0)
        return kept

    def _ragged(self, inputs: ZImageInputs) -> bool:
        """Whether prompts are of different lengths, and so must be told how many tokens are theirs."""
        return len({_padded(len(prompt)) for prompt in inputs.encoder_hidden_states}) > 1

    def embed_image(self, part: TransformerPart) -> Shared:
        module, inputs, rows = self.module, part.inputs, part.rows
        (height, width), padding = inputs.size, self.padding(inputs)
        sample = inputs.sample[: rows.images]
        patches = sample.unflatten(3, (width, PATCH)).unflatten(2, (height, PATCH)).permute(0, 2, 4, 3, 5, 1)
        embedder = module.all_x_embedder[EMBEDDER]
        image = part.run(embedder, Shared(patches.reshape(rows.images, height * width, -1), False, False))
        if padding:
            filled = module.x_pad_token.expand(image.value.shape[0], padding, -1)
            image = replace(image, value=torch.cat([image.value, filled], 1))
        turns = Shared(part.conditions.positions[1][:, : height * width + padding], False, True)
        for block in module.noise_refiner:
            image, turned, temb = part.rows_for(block, image, turns, part.temb)
            image = replace(image, value=block(image.value, None, turned.value, temb.value))
        return image

    def embed_time(self, part: TransformerPart) -> Shared:
        module, inputs = self.module, part.inputs
        time = Shared(inputs.timestep.expand(part.rows.own), False, True)
        if module.t_embedder in part.conditions.carrying:
            time = Shared(whole(time, part.rows), True, True)
        embedded = module.t_embedder(time.value * module.t_scale).type_as(inputs.sample)
        return Shared(embedded, time.by_prediction, True)

    def block(self, part: TransformerPart, index: int, state: State) -> State:
        block, given = self.blocks[index], part.inputs.controlnet_block_samples or {}
        positions = (Shared(p, False, True) for p in part.conditions.positions[1:3])
        tokens, temb, turns, here = part.rows_for(block, part.joined(state), part.temb, *positions)
        mask = None
        if self._ragged(part.inputs):
            there = here.value
            mask = torch.cat([there.new_ones(there.shape[0], tokens.value.shape[1] - there.shape[1]), there], 1)
        changed = replace(tokens, value=block(tokens.value, mask, turns.value, temb.value))
        return (part.add_own(changed, given[index]) if index in given else changed,)

    def finish(self, part: TransformerPart, image: Tensor) -> Tensor:
        module, (height, width) = self.module, part.inputs.size
        patches = module.all_final_layer[EMBEDDER](image, c=whole(part.temb, part.rows))
        patches = patches.view(-1, height, width, PATCH, PATCH, module.out_channels).permute(0, 5, 1, 3, 2, 4)
        noise: Tensor = patches.reshape(-1, module.out_channels, height * PATCH, width * PATCH)
        return noise

    def latents(self, inputs: ZImageInputs) -> Tensor:
        return inputs.sample

    def placeless(self) -> set[nn.Module]:
        return layers_in([self.module.cap_embedder, self.module.context_refiner, self.module.t_embedder])

    def baked(self) -> tuple[object, ...] | None:
        return None  # its prompts' lengths decide which tensors there are


class ZImageFamily(TransformerFamily):
    """Z-Image; its omni pipeline passes pictures beside the latents and is refused."""

    kind = ZImageTransformer2DModel
    pipelines = (
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
    )

    def check(self, module: Any) -> None:
        super().check(module)
        if EMBEDDER not in module.all_x_embedder or module.siglip_embedder is not None:
            raise UnsupportedModelError("this ZImageTransformer2DModel has other patches than 2 x 2, or is an omni one")

    def passed(self, timesteps: Tensor) -> Tensor:
        return (1000 - timesteps) / 1000

    def prompt(self, pipe: Any, name: str, given: Any) -> dict[str, Tensor]:
        raise ConfigError("prompts: Z-Image takes none of an adapter's own, its prompts being of different lengths")

    def read(self, arguments: Mapping[str, Any]) -> Call:
        given = dict(arguments)
        scale, return_dict = self.take_kwargs(given), given.pop("return_dict", True)
        x, prompts = given["x"], given["cap_feats"]
        for name in ("siglip_feats", "image_noise_mask"):
            if given.get(name) is not None:
                raise RunError(f"{name} is not supported")
        if given.get("patch_size", PATCH) != PATCH or given.get("f_patch_size", 1) != 1:
            raise RunError("patch_size must be 2 and f_patch_size 1")
        if not all(isinstance(t, Tensor) and t.shape[1] == 1 for t in x) or len({t.shape for t in x}) > 1:
            raise RunError("x must be a tensor [channels, 1, height, width] of one size per row")
        turned, samples = self._apply_cfg() and len(x) % 2 == 0, given.get("controlnet_block_samples")
        halves = [turn(list(rows), turned) for rows in (x, prompts)]
        sample = torch.stack(halves[0])[:, :, 0]
        samples = samples and {i: torch.cat(turn(list(s.split(1)), turned)) for i, s in samples.items()}
        inputs = ZImageInputs(
            sample=sample,
            timestep=given["t"].expand(sample.shape[0]),
            size=(sample.shape[2] // PATCH, sample.shape[3] // PATCH),
            encoder_hidden_states=tuple(halves[1]),  # type: ignore[arg-type]  # a tensor per row
            turned=turned,
            controlnet_block_samples=samples,
        )
        return Call(inputs, scale, return_dict)

    def _apply_cfg(self) -> bool:
        frame, by_itself = calling_frame(self.pipelines)
        return frame is not None and by_itself and bool(frame.f_locals.get("apply_cfg"))

    def guidance(self, frame: FrameType | None, by_itself: bool, inputs: Any) -> tuple[int, bool, bool | None]:
        return (2 if inputs.turned else 1), frame is not None, None

    def batched(self, module: Any, config: CMLoRAConfig, running: Running) -> BatchedZImage:
        return BatchedZImage(module, config, running)

    def result(self, noise: Tensor, call: Call) -> Any:
        rows = turn(list(noise.unsqueeze(2)), call.inputs.turned)  # type: ignore[attr-defined]  # ZImageInputs
        return Transformer2DModelOutput(sample=rows) if call.return_dict else (rows,)


def turn(rows: Sequence[Tensor], turned: bool) -> list[Tensor]:
    """The halves the other way round."""
    half = len(rows) // 2
    return [*rows[half:], *rows[:half]] if turned else [*rows]


def _padded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def _grid(module: Any, size: tuple[int, int, int], start: tuple[int, int, int], device: torch.device) -> Tensor:
    grid: Tensor = module.create_coordinate_grid(size=size, start=start, device=device)
    return grid.flatten(0, 2)
