"""The methods. A new one is one module with `Config`, `plan` and `run` (see `base`), a line here, a proof page and an example."""

from types import ModuleType
from typing import cast

from . import dosser, dpmerf, joint, ndpdc
from .base import Method, Public, Sampler, Student, Synthetic, Workspace
from .diffusion import dpdm, dpsad, paper, shard_teachers
from .model import conversion_way, opaque, teacher, votes

METHODS: dict[str, Method] = {
    "joint": cast(Method, joint),
    "dosser": cast(Method, dosser),
    "ndpdc": cast(Method, ndpdc),
    "dpmerf": cast(Method, dpmerf),
}

# The ways to a student model. The first two ask the door, so they are methods like the others; the last two get a teacher as it is.
MODEL_METHODS: dict[str, ModuleType] = {
    "teacher": teacher,
    "votes": votes,
    "conversion": conversion_way,
    "opaque": opaque,
}

# The ways to a diffusion model. All but the last ask the door; the paper's own form sees the records, and guarantees nothing.
DIFFUSION_METHODS: dict[str, ModuleType] = {
    "dpsad": dpsad,
    "dpdm": dpdm,
    "shards": shard_teachers,
    "paper": paper,
}

__all__ = [
    "DIFFUSION_METHODS",
    "METHODS",
    "MODEL_METHODS",
    "Method",
    "Public",
    "Sampler",
    "Student",
    "Synthetic",
    "Workspace",
]
