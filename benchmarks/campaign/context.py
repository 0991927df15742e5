"""What every stage is given, and the problems that stages share."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from deconv_ext.bench_contenders import PRECISIONS
from deconv_ext.bench_machine import ceilings, environment, gpu_state
from deconv_ext.bench_timing import EventTimer
from deconv_ext.build import extension
from deconv_ext.testing import EDGE, TINY, Case, Operands, load_layers, relayout

from .journal import Job, Journal

#: In the order of value: what networks are trained with first.
ORDER = ("bfloat16", "tf32", "float32", "float16", "float64")
PRODUCTS = ("forward", "grad_input", "grad_weight")


@dataclasses.dataclass(frozen=True)
class Context:
    """A stage's device, results and time. `dry`: on the CPU, every problem small."""

    out: Path
    dry: bool
    deadline: float  # by time.monotonic()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def journal(self, name: str, **facts: Any) -> Journal:
        facts = self.facts(state_at_start=gpu_state(), **facts)
        return Journal(self.out / f"{name}.json", facts, self.deadline)

    def facts(self, **more: Any) -> dict[str, Any]:
        return environment(self.device, dry=self.dry, **more)

    def layers(self) -> list[Case]:
        """The benchmark's, so ordered that every class is met early."""
        cases = by_class(load_layers("gpu"))
        return [shrunk(case) for case in cases[:8]] if self.dry else cases

    def small_cases(self) -> list[Case]:
        """Problems that are quick to compute and hard to get right, the varied ones first."""
        reduced = [case.reduced(1_000_000) for case in by_class(load_layers("gpu"))]
        if self.dry:
            return [*EDGE[::9], *TINY[::40]]
        return [*EDGE, *reduced, *TINY[::3]]

    def some(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """All of them; in a dry run every eleventh, which meets all dtypes and operations."""
        return itertools.islice(jobs, 0, None, 11 if self.dry else 1)

    def timer(self, samples: int, seconds: float) -> EventTimer:
        return EventTimer(self.device, 2 if self.dry else samples, 0.0 if self.dry else seconds)

    def ceilings(self) -> dict[str, Any]:
        return ceilings(self.device, ORDER, *((64, 1, 0.0) if self.dry else ()))


def by_class(cases: Iterable[Case]) -> list[Case]:
    """The first of each class, then the second of each, and so on."""
    classes: dict[str, list[Case]] = {}
    for case in cases:
        classes.setdefault(case.kind, []).append(case)
    turns = itertools.zip_longest(*classes.values())
    return [case for turn in turns for case in turn if case is not None]


def by_value(operations: Sequence[str], layers: Sequence[Case]) -> list[tuple[str, str, Case]]:
    """Every (dtype, operation, layer): the first operation in the two dtypes that matter most, then
    everything for one layer of each class, then the rest."""
    classes = len({case.kind for case in layers})
    choices = itertools.chain(
        itertools.product(ORDER[:2], operations[:1], layers),
        itertools.product(ORDER, operations, layers[:classes]),
        itertools.product(ORDER, operations, layers),
    )
    return list(dict.fromkeys(choices))


def shrunk(case: Case) -> Case:
    """The layer with a small image and two or four channels in each of at most four groups."""
    groups = min(case.groups, 4)
    c_in, c_out = (groups * min(c // case.groups, 4) for c in (case.c_in, case.c_out))
    h, w = min(case.h, 5), min(case.w, 6)
    return dataclasses.replace(case, batch=2, c_in=c_in, c_out=c_out, groups=groups, h=h, w=w)


def arranged(t: Operands, layout: str, device: torch.device) -> Operands:
    """The same numbers on the device, in a layout."""
    x, w, bias, dy = (tensor.to(device) for tensor in t)
    return Operands(relayout(x, layout), relayout(w, layout), bias, relayout(dy, layout))


def algorithms(op: str, device: torch.device) -> list[str]:
    """Every implementation and configuration that can be forced, and our own choice."""
    return ["auto", *extension().list_algorithms(op, device.type)]


def conditions() -> Iterator[tuple[str, str]]:
    """Each dtype, in the order of value, in each layout."""
    assert set(ORDER) == set(PRECISIONS)
    yield from itertools.product(ORDER, ("contiguous", "channels_last"))
