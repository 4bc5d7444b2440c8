"""Where networks that read no record may run in bfloat16."""

import functools

import torch


def autocast(device: torch.device | str, wanted: bool = True) -> torch.autocast:
    """Returns a context in which matrix products run in bfloat16, if that is `wanted` and the device is quick in it.

    Never around what a record goes through: per-record values stay in float32. Results depend on the machine by more than the last
    bits where this is used, so a run that is resumed on a machine of another kind is not the same to the byte.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=wanted and is_fast(kind))


@functools.cache
def is_fast(kind: str) -> bool:
    """Whether devices of this kind have bfloat16 in hardware: a CPU without (AVX2 only) takes 12 to 16 times as long as in float32."""
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False
