"""What an image is to show: each kind of condition is one file, and one entry of KINDS.

A condition states which request inputs it takes and which block inputs it makes of them. The
orchestrator, the export and the ensembles know no more than this interface.
"""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from flowturbo.conditions.class_label import ClassLabel
from flowturbo.conditions.prompt import Prompt
from flowturbo.contract import COMMON_INPUTS, COMMON_OUTPUTS, PIPELINE_INPUT, Specs
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.rows import AwaitedInfer, Tensors


class Condition(Protocol):
    """What a pipeline's images are conditioned on."""

    kind: ClassVar[str]
    asked_by: ClassVar[str]
    unguided_because: ClassVar[str]
    request_inputs: ClassVar[Specs]
    request_outputs: ClassVar[Specs]

    @property
    def block_inputs(self) -> Specs:
        """The conditioning tensors of the step blocks."""
        ...

    @property
    def encoder_inputs(self) -> Specs:
        """The inputs of the text encoder that makes them; empty if there is none."""
        ...

    @property
    def can_guide(self) -> bool:
        """Whether there is an unconditional value."""
        ...

    def parse(self, tensors: Mapping[str, np.ndarray], max_images: int, *, guided: bool) -> Sized:
        """The checked value of a request, one entry per image; raises RequestError."""
        ...

    async def encode(
        self, value: Any, infer: AwaitedInfer, *, guided: bool
    ) -> tuple[Tensors, Tensors]:
        """The block inputs of `value`, [n, ...] each, and the unconditional ones, [1 or n, ...].

        The latter are empty unless `guided`.
        """
        ...

    def texts(self, value: Any) -> Tensors:
        """Inputs [k, ...] of the text encoder for `value`; empty if there is none."""
        ...

    def pinned(self) -> Tensors:
        """Inputs [k, ...] of the text encoder whose outputs most requests need; may be empty."""
        ...

    def request(self, value: Any) -> Tensors:
        """The request inputs that ask for `value` again."""
        ...

    def answer(self, value: Any) -> Tensors:
        """The condition's request outputs for `value`."""
        ...

    def sample(self, rows: int, generator: np.random.Generator) -> Tensors:
        """Block inputs [rows, ...] of random values, for checks of the networks."""
        ...

    def sample_encoder(self, rows: int, generator: np.random.Generator) -> Tensors:
        """Inputs [rows, ...] of the text encoder for random texts, for checks of it."""
        ...

    def example(self, images: int) -> Tensors:
        """Request inputs that ask for some `images` images, for checks of the service."""
        ...

    def record(self) -> dict[str, Any]:
        """What the pipeline's record says of it, beside its kind."""
        ...

    def described(self) -> dict[str, Any]:
        """What callers are told of it: request inputs, sizes, names."""
        ...


KINDS = {each.kind: each for each in (ClassLabel, Prompt)}

T = TypeVar("T")


def read_condition(stated: Mapping[str, Any], folder: Path) -> Condition:
    """The condition of a pipeline's record; raises RepositoryError for an unknown kind.

    `folder` is the version folder of the pipeline's text encoder, if it has one.
    """
    options = dict(stated)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise RepositoryError(f"condition {kind!r} is unknown, known are {', '.join(KINDS)}")
    return KINDS[kind].of_record(options, folder)


def write_condition(condition: Condition) -> dict[str, Any]:
    """What `read_condition` reads."""
    return {"kind": condition.kind, **condition.record()}


def _conditioned_inputs() -> Specs:
    return tuple(dict.fromkeys(spec for each in KINDS.values() for spec in each.request_inputs))


def _conditioned_outputs() -> Specs:
    return tuple(dict.fromkeys(spec for each in KINDS.values() for spec in each.request_outputs))


# All that the orchestrator takes and answers: a pipeline refuses what is not its own.
REQUEST_INPUTS = (PIPELINE_INPUT, *_conditioned_inputs(), *COMMON_INPUTS)
REQUEST_OUTPUTS = (*COMMON_OUTPUTS[:-2], *_conditioned_outputs(), *COMMON_OUTPUTS[-2:])


def refuse_others(
    name: str, given: Mapping[str, object], conditions: Mapping[str, Condition]
) -> None:
    """Raises RequestError for an input of another kind of condition than pipeline `name` takes.

    `conditions` are those of all pipelines. The message names the pipelines that take the input.
    """
    takes = _names(conditions[name])
    for spec in _conditioned_inputs():
        if spec.name in given and spec.name not in takes:
            others = [each for each, of in conditions.items() if spec.name in _names(of)]
            raise RequestError(
                f"pipeline {name} takes {conditions[name].asked_by}, not {spec.name}; pipelines "
                f"that take {spec.name}: {', '.join(others) or 'none'}"
            )


def _names(condition: Condition) -> list[str]:
    return [spec.name for spec in condition.request_inputs]
