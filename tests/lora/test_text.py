"""Text encoders whose LoRA part must act for every adapter that the UNet composes."""

import pytest
import torch

from cmlora.errors import AdapterError
from cmlora.lora.text import activate, active_text, check, text_adapters
from tests.adapter.loop import small_unet
from tests.models import add_lora, relative, sd_pipe, sdxl_pipe


def load(pipe, name, encoder="text_encoder", seed=1):
    """What pipe.load_lora_weights does with a file that has a text part."""
    model, generator, state = getattr(pipe, encoder), torch.Generator().manual_seed(seed), {}
    for path, module in model.named_modules():
        path = path.replace(".base_layer", "")
        if path.endswith(("q_proj", "v_proj")) and isinstance(getattr(module, "weight", None), torch.Tensor):
            out, width = module.weight.shape
            state[f"{encoder}.{path}.lora_A.weight"] = torch.randn(2, width, generator=generator)
            state[f"{encoder}.{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    pipe.load_lora_into_text_encoder(state, None, model, prefix=encoder, adapter_name=name)


@pytest.fixture
def pipe():
    pipe = sd_pipe(small_unet())
    for seed, name in enumerate("abc"):
        add_lora(pipe.unet, name, seed=seed)
        if name != "b":
            load(pipe, name, seed=seed)
    return pipe


def encode(pipe):
    return pipe.text_encoder(torch.tensor([[0, 5, 7, 1]])).last_hidden_state


def test_loading_one_after_the_other_leaves_the_last_alone(pipe):
    assert text_adapters(pipe) == {"text_encoder": ("a", "c")}
    assert active_text(pipe) == {"text_encoder": ("c",)}
    with pytest.raises(AdapterError, match=r"a also changes the text_encoder.*set_adapters\(\['a', 'b', 'c'\]\)"):
        check(pipe, ["a", "b", "c"])
    check(pipe, ["b", "c"])
    check(sd_pipe(small_unet()), ["a"])


def test_both_advices(pipe):
    pipe.set_adapters(["a", "b", "c"])
    check(pipe, ["a", "b", "c"])
    pipe.set_adapters(["c"])
    pipe.text_encoder.disable_adapters()
    check(pipe, ["a", "b", "c"])


def test_activated_as_set_adapters_does_and_back(pipe):
    pipe.set_adapters(["a", "b", "c"], [0.5, 1.0, 2.0])
    want = encode(pipe)
    model = pipe.text_encoder
    pipe.text_encoder.set_adapter("c")
    before, flags = encode(pipe), {name: p.requires_grad for name, p in model.named_parameters()}
    undo = activate(pipe, ["a", "b", "c"])
    check(pipe, ["a", "b", "c"])
    assert relative(encode(pipe), want) < 1e-6
    assert relative(before, want) > 1e-3
    undo()
    assert torch.equal(encode(pipe), before)
    assert active_text(pipe) == {"text_encoder": ("c",)}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_every_encoder_is_looked_at():
    pipe = sdxl_pipe()
    load(pipe, "a", "text_encoder_2")
    load(pipe, "b", "text_encoder_2", seed=2)
    assert text_adapters(pipe) == {"text_encoder_2": ("a", "b")}
    with pytest.raises(AdapterError, match=r"a also changes the text_encoder_2"):
        check(pipe, ["a", "b"])


def test_fused_adapters_act(pipe):
    pipe.set_adapters(["a", "c"])
    pipe.fuse_lora(components=["text_encoder"])
    pipe.set_adapters(["c"])
    check(pipe, ["a", "b", "c"])
