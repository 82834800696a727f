"""Merged weights: made anew where something may have changed, without waiting for a device."""

import pytest
import torch

from cmlora.lora.bank import LayerBank
from cmlora.lora.merged import MergedBank


def test_off_the_cpu_nothing_is_compared(monkeypatch):
    """torch.equal waits for the device."""
    tensors = [torch.zeros(size, device="meta") for size in ((2, 3, 4), (2, 8, 3), (2, 1))]
    bank = LayerBank(*tensors, torch.zeros(2, 3, dtype=torch.int32))
    merged = MergedBank(torch.zeros(8, 4, device="meta"), bank)
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("this waits for the device"))
    merged.renew()
