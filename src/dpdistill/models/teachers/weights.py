"""A safetensors file with the code of its network: nothing is unpickled."""

from __future__ import annotations

import importlib
import json
import re
import struct
import sys
from typing import Any

import torch
from torch import Tensor, nn

from dpdistill.data.files import no_warnings, one_error_type
from dpdistill.errors import InputError

with no_warnings():
    pass
from dpdistill.models.teachers.base import MAX_HEADER, MAX_TENSORS


def network_of(architecture: str, raw: bytes, path: object) -> nn.Module:
    """Returns the network with the weights of a safetensors file, strictly, in eval mode."""
    tensors = read_tensors(raw, path)
    network = build(architecture)
    state = network.state_dict()
    missing = sorted(set(state) - set(tensors))
    if missing or len(tensors) != len(state):
        extra = len(set(tensors) - set(state))
        first = f", first {missing[0]}" if missing else ""
        reason = f"is not of the network {architecture}: {len(missing)} tensors missing{first}, {extra} unknown"
        raise InputError(path, reason, "save model.state_dict() of this very network")
    with one_error_type(path):
        for name, value in state.items():
            tensor = tensors[name]
            if tensor.shape != value.shape or tensor.is_floating_point() != value.is_floating_point():
                found, wanted = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (tensor, value))
                hint = f"is {architecture} the right network?"
                raise InputError(path, f"has {name} of {found}, wanted {wanted}", hint)
        network.load_state_dict(tensors, strict=True)
    return network.eval().requires_grad_(False)


def read_tensors(raw: bytes, path: object) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file. Repeated keys, a long header and values that are not finite are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise InputError(path, "has two tensors of one name", "save it with safetensors.torch.save_file")
        return dict(pairs)

    with no_warnings():
        import safetensors.torch

    with one_error_type(path):
        (length,) = struct.unpack_from("<Q", raw)
        if length > min(MAX_HEADER, len(raw) - 8):
            raise InputError(path, "has a header that is too long", "save it with safetensors.torch.save_file")
        header = json.loads(raw[8 : 8 + length].decode("utf-8"), object_pairs_hook=unique)
        if len(header) > MAX_TENSORS:
            raise InputError(path, f"has more than {MAX_TENSORS:,} tensors", "use a smaller model")
        tensors = safetensors.torch.load(raw)
        for tensor in tensors.values():
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                raise InputError(
                    path, "has a weight that is not finite", "train it again, or take an earlier checkpoint"
                )
        return tensors


def build(architecture: str) -> nn.Module:
    """Imports 'module:callable' from `sys.path` and returns the network it makes. PyTorch's random state is left alone."""
    part = r"[A-Za-z_][A-Za-z0-9_]*"
    if not re.fullmatch(rf"{part}(\.{part})*:{part}", architecture, re.ASCII):
        raise InputError(
            architecture, "is not an architecture", "write module:callable, for example mynets:small_resnet"
        )
    module, attribute = architecture.split(":")
    with no_warnings():  # about the user's code, which is not ours to judge
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            hint = f"it is looked for on sys.path, which begins with {sys.path[:2]}; set PYTHONPATH"
            raise InputError(architecture, f"needs a module that is not found: {error.name}", hint) from None
        except (Exception, SystemExit) as error:
            reason = f"fails when it is imported ({type(error).__name__})"
            raise InputError(architecture, reason, f"try python -c 'import {module}'") from error
        make = getattr(found, attribute, None)
        if not callable(make):
            raise InputError(architecture, "names nothing that can be called", f"define {attribute} in {module}")
        try:
            with torch.random.fork_rng(devices=[]):
                network = make()
        except Exception as error:
            reason = f"fails when it is called without arguments ({type(error).__name__})"
            raise InputError(architecture, reason, "wrap it: def teacher(): return Net(n_classes=10)") from error
    if not isinstance(network, nn.Module):
        raise InputError(
            architecture, f"returns a {type(network).__name__}, wanted a torch.nn.Module", "return the network"
        )
    return network
