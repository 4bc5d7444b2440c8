"""A teacher whose guarantee is known: conversion is post-processing, so any generator and any number of questions are free.

Source: the part of DPDFD (IJCAI 2023) that holds; proof: docs/privacy/conversion.md. Nothing private is read here.
"""

from dataclasses import dataclass

from ..base import Public, Student, Workspace
from .conversion import Conversion, Teacher, convert
from .gallery import finish


@dataclass(frozen=True, kw_only=True)
class Config(Conversion):
    """Public settings: those of `Conversion`.

    Attributes:
      per_class: images of the generator that are released with the student.
    """

    per_class: int = 10


def run(
    config: Config, public: Public, teacher: Teacher, workspace: Workspace, differentiable: bool = False
) -> Student:
    """Returns the student of a teacher that may be asked anything."""
    made = convert(teacher, public, config, workspace, differentiable=differentiable)
    return finish(made.student, made.generator, public, workspace, config.per_class, teacher)
