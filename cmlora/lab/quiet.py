"""What other libraries say about things that are as they should be: the command line leaves it out, and nothing else.

A message is left out if its logger and its text are listed here; every other one of the same logger comes through.
"""

from __future__ import annotations

import logging
import re
import warnings

HARMLESS_LOGS = (
    # the slower image processor of two, of which a text-to-image pipeline uses neither
    ("transformers.utils.import_utils", r"`\w+` requires torchvision \(not installed\); falling back to"),
    # a LoRA without weights for the text encoder; one without any for the UNet is another message, and an error of ours
    ("diffusers.loaders.lora_base", r"No LoRA keys associated to CLIPTextModel\w* found with the prefix='text_encoder"),
    ("diffusers.loaders.peft", r"No LoRA keys associated to CLIPTextModel\w* found with the prefix='text_encoder"),
    # the model's folder has none
    ("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "You have disabled the safety checker"),
    # `dtype` is not known to all releases of diffusers that we support
    ("transformers.modeling_utils", "`torch_dtype` is deprecated"),
    ("transformers.configuration_utils", "`torch_dtype` is deprecated"),
)
HARMLESS_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, "`torch_dtype` is deprecated"),
    # several LoRAs are what this library is for
    (UserWarning, "Already found a `peft_config` attribute in the model"),
)


class _Harmless(logging.Filter):
    """Lets every record pass but those that say what is listed for its logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        listed = (text for name, text in HARMLESS_LOGS if name == record.name)
        return not any(re.match(text, record.getMessage()) for text in listed)


_HARMLESS = _Harmless()


def leave_out_harmless_messages() -> None:
    """For the rest of this process; calling it again changes nothing."""
    for name, _ in HARMLESS_LOGS:
        logging.getLogger(name).addFilter(_HARMLESS)
    for category, text in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", text, category)
