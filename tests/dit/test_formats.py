"""LoRA files as trainers write them and diffusers converts them, composed as a loop of plain calls composes them."""

import pytest
import torch

import cmlora
from cmlora.lab.bench.tiny import relative
from cmlora.lab.bench.tiny_transformers import draw, pipeline
from tests.dit.peer import Peer

WIDTH = 32


class Writer:
    """Random pairs of weights under the names of a format."""

    def __init__(self, seed, down, up, alpha=None):
        self.generator, self.names, self.alpha, self.state = torch.Generator().manual_seed(seed), (down, up), alpha, {}

    def pair(self, name, inner, outer, rank=4):
        for suffix, shape, scale in zip(self.names, ((rank, inner), (outer, rank)), (inner**-0.5, 0.2), strict=True):
            self.state[name + suffix] = torch.randn(shape, generator=self.generator) * scale
        if self.alpha is not None:
            self.state[f"{name}.alpha"] = torch.tensor(self.alpha)
        return self


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


def flux_kohya():
    writer = Writer(1, *KOHYA, alpha=2.0)
    for i in range(2):
        for stream in ("img", "txt"):
            name = f"lora_unet_double_blocks_{i}_{stream}"
            writer.pair(f"{name}_attn_qkv", WIDTH, 3 * WIDTH, rank=3).pair(f"{name}_attn_proj", WIDTH, WIDTH)
            writer.pair(f"{name}_mlp_0", WIDTH, 4 * WIDTH).pair(f"{name}_mlp_2", 4 * WIDTH, WIDTH)
            writer.pair(f"{name}_mod_lin", WIDTH, 6 * WIDTH)
    for i in range(3):
        name = f"lora_unet_single_blocks_{i}"
        writer.pair(f"{name}_linear2", 5 * WIDTH, WIDTH).pair(f"{name}_modulation_lin", WIDTH, 3 * WIDTH)
    return writer.state


def flux_xlabs():
    writer = Writer(2, ".down.weight", ".up.weight")
    for i in range(2):
        for k in (1, 2):
            writer.pair(f"double_blocks.{i}.processor.qkv_lora{k}", WIDTH, 3 * WIDTH)
            writer.pair(f"double_blocks.{i}.processor.proj_lora{k}", WIDTH, WIDTH)
    return writer.state


def flux_peft():
    writer = Writer(3, *PEFT)
    for i in range(3):
        name = f"transformer.single_transformer_blocks.{i}"
        for part, outer in (("attn.to_q", WIDTH), ("attn.to_v", WIDTH), ("proj_mlp", 4 * WIDTH)):
            writer.pair(f"{name}.{part}", WIDTH, outer, rank=5)
    return writer.pair("transformer.x_embedder", 16, WIDTH).state


def qwen_kohya():
    writer = Writer(4, *KOHYA, alpha=2.0)
    for i in range(4):
        for part in ("attn_to_q", "attn_to_out_0", "attn_add_k_proj"):
            writer.pair(f"lora_unet_transformer_blocks_{i}_{part}", WIDTH, WIDTH)
    return writer.state


def prefixed(seed, modules, names=KOHYA):
    writer = Writer(seed, *names)
    for module in modules:
        writer.pair(f"diffusion_model.{module}", WIDTH, WIDTH, rank=5)
    return writer.state


def sd3_peft(seed):
    writer = Writer(seed, *PEFT)
    for i in range(4):
        writer.pair(f"transformer.transformer_blocks.{i}.attn.to_k", WIDTH, WIDTH)
        writer.pair(f"transformer.transformer_blocks.{i}.ff.net.2", 4 * WIDTH, WIDTH, rank=6)
    return writer.state


FILES = {
    "flux": (flux_kohya, flux_xlabs, flux_peft),
    "sd3": (lambda: sd3_peft(5), lambda: sd3_peft(6)),
    "qwen": (qwen_kohya, lambda: prefixed(7, [f"transformer_blocks.{i}.attn.to_v" for i in range(4)])),
    "z_image": (
        lambda: prefixed(8, [f"layers.{i}.attention.to_q" for i in range(4)]),
        lambda: prefixed(9, [f"layers.{i}.attention.to_out.0" for i in range(4)], PEFT),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_trainers_compose(kind):
    pipe = pipeline(kind)
    names = [f"file_{i}" for i in range(len(FILES[kind]))]
    for name, make in zip(names, FILES[kind], strict=True):
        pipe.load_lora_weights(make(), adapter_name=name)
    pipe.set_adapters(names, [0.8, 1.2, 0.6][: len(names)])
    with Peer(pipe, kind, names, "deviation", weights=[0.8, 1.2, 0.6][: len(names)], interval=2):
        want = draw(pipe, kind)
    assert relative(want, draw(pipe, kind)) > 1e-4
    with cmlora.accelerated(pipe, method="composite", combine="deviation", cache_interval=2, cache_branch=(1, 1)):
        assert relative(draw(pipe, kind), want) < 1e-5
        pipe.delete_adapters(names[-1])
        if len(names) == 2:
            with pytest.raises(cmlora.AdapterError, match="at least two adapters"):
                draw(pipe, kind)
        else:
            draw(pipe, kind)
            assert cmlora.summary(pipe).adapters == tuple(names[:-1])


def test_a_file_that_matched_nothing_is_an_error_that_says_how_keys_must_read():
    pipe = pipeline("flux")
    with pytest.raises(cmlora.AdapterError, match=r"the transformer carries no LoRA layer.*'transformer\.<layer>"):
        cmlora.accelerate(pipe, method="routed")
