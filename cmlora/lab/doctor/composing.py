"""The second part: the shipped model composed in every way that this machine can run, against plain torch."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cmlora.accelerate import accelerate, restore
from cmlora.lab.demo import load_pipe, prompt_for
from cmlora.lab.doctor.findings import Finding, announce, judge, send
from cmlora.lab.quiet import leave_out_harmless_messages
from cmlora_kernels import multi_lora_linear

ROLES = ("character", "background")
ALLOWED = 1e-3
"""Of the latents' largest value: what float32 in another order may come to over a few steps."""
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "routed"},
    {"method": "cmlora", "partition": "online", "cache_interval": 2},
)


def compose_all(device: torch.device, backend: str, seconds: float) -> Iterator[Finding]:
    """Every way that there is; what cannot be done here is left out and says why.

    Args:
        device: where. backend: of the kernels ("triton", "interpreter", "definition"). seconds: after which the rest is
            left out.
    """
    end = time.perf_counter() + seconds
    pipe = load_pipe(ROLES)
    pipe.set_progress_bar_config(disable=True)
    plain: dict[str, Tensor] = {}
    how = INTERPRETED if backend == "interpreter" else WHOLE
    for name, ways in _ways(device, backend).items():
        announce(name)
        start = time.perf_counter()
        if isinstance(ways, str):
            yield Finding(name, "left out", ways)
        elif start > end:
            yield Finding(name, "left out", "no time left")
        else:
            try:
                yield _against_plain(name, pipe, ways, how, plain)
            except Exception as error:  # whatever it is, it is what the doctor was asked for
                yield Finding(name, "failed", f"{type(error).__name__}: {error}"[:300])
            finally:
                restore(pipe)
    name = "torch.compile, one graph"
    yield _compiled(name, device) if time.perf_counter() < end else Finding(name, "left out", "no time left")


def _ways(device: torch.device, backend: str) -> dict[str, dict[str, Any] | str]:
    """Name -> fields of the configuration, or why it cannot be done here."""
    ways: dict[str, dict[str, Any] | str] = {}
    for method in INTERPRETED_METHODS if backend == "interpreter" else METHODS:
        title = f"compose {method['method']}"
        ways[f"{title}, plain torch"] = {**method, "backend": "torch"}
        kernels = f"{title}, kernels" + (" in the interpreter" if backend == "interpreter" else "")
        ways[kernels] = {**method, "backend": "triton"} if backend != "definition" else "no kernel can run here"
        graphs = {**method, "cuda_graphs": True}
        ways[f"{title}, CUDA graphs"] = graphs if device.type == "cuda" else "needs a GPU"
    return ways


def _against_plain(
    name: str, pipe: Any, fields: dict[str, Any], how: dict[str, Any], plain: dict[str, Tensor]
) -> Finding:
    start = time.perf_counter()
    accelerate(pipe, **fields)
    repeats = 2 if fields.get("cuda_graphs") else 1  # a kind of step is captured at its second occurrence
    for _ in range(repeats):
        latents = _draw(pipe, how)
    if not latents.isfinite().all():
        return Finding(name, "wrong", "the latents hold numbers that are none", seconds=time.perf_counter() - start)
    if fields.get("backend") == "torch":
        plain[fields["method"]] = latents
        return Finding(name, "right", seconds=time.perf_counter() - start)
    want = plain[fields["method"]]
    error = ((latents - want).abs().max() / want.abs().max()).item()
    return judge(name, error, ALLOWED, time.perf_counter() - start)


WHOLE: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0}
INTERPRETED: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16}
"""Of a call. The interpreter takes thousands of times as long as a GPU: one method, 16 x 16 pixels, no guidance."""
INTERPRETED_METHODS: tuple[dict[str, Any], ...] = (
    {"method": "cmlora", "partition": "online", "combine": "mean", "cache_interval": 2},
)


def _draw(pipe: Any, how: dict[str, Any]) -> Tensor:
    """Latents of a few steps at one seed, on the CPU."""
    generator = torch.Generator().manual_seed(3)
    latents: Tensor = pipe(prompt_for(ROLES), generator=generator, output_type="latent", **how).images
    return latents.float().cpu()


_COMPILED = ((2, 8, 64), (64, 64), (1, 4, 64), (1, 64, 4))  # x, weight, a and b of a layer


def _compiled(name: str, device: torch.device) -> Finding:
    """A layer of ours among others, through torch.compile with its default compiler, as one graph."""
    announce(name)
    start = time.perf_counter()
    g = torch.Generator().manual_seed(0)
    x, weight, a, b = (torch.randn(size, generator=g).to(device) / 8 for size in _COMPILED)
    slots, scales = torch.tensor([0, -1], device=device), torch.ones(1, 1, device=device)

    def layer(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(multi_lora_linear(x + 1, weight, None, slots, a, b, scales)) * 2

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = torch.compile(layer, fullgraph=True)(x)
    except Exception as why:  # no C++ compiler, most often: what the user's own torch.compile would say, too
        return Finding(name, "left out", f"torch.compile does not work here: {why}"[:200])
    error = ((got - layer(x)).abs().max() / layer(x).abs().max()).item()
    return judge(name, error, 1e-5, time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    """Arguments: the backend and seconds."""
    backend, seconds = sys.argv[1], float(sys.argv[2])
    leave_out_harmless_messages()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    send(compose_all(device, backend, seconds))


if __name__ == "__main__":
    main()
