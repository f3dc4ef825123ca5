"""One class per image, by id or by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from flowturbo.contract import Specs, TensorSpec, text_of
from flowturbo.errors import RequestError
from flowturbo.rows import Tensors

LABEL = "label"
CLASS_NAME = "class_name"
_SHOWN = 40  # names, or characters of one, in a message


@dataclass(frozen=True)
class ClassLabel:
    """One of `num_classes` classes; the block's label `num_classes` is the null class.

    Without `null_class` the networks were trained with classes alone and cannot be guided.
    A request's value is its class ids, [n] int64.
    """

    num_classes: int
    class_names: tuple[str, ...] = ()
    null_class: bool = True

    kind: ClassVar[str] = "class_label"
    asked_by: ClassVar[str] = f"{LABEL} or {CLASS_NAME}"
    unguided_because: ClassVar[str] = (
        "guidance needs a network that was also trained without classes, but this one has no null "
        "class"
    )
    request_inputs: ClassVar[Specs] = (
        TensorSpec(LABEL, np.int64, (-1,), optional=True),
        TensorSpec(CLASS_NAME, np.object_, (-1,), optional=True),
    )
    request_outputs: ClassVar[Specs] = (TensorSpec(CLASS_NAME, np.object_, (-1,)),)
    block_inputs: ClassVar[Specs] = (TensorSpec(LABEL, np.int64, (1,)),)
    encoder_inputs: ClassVar[Specs] = ()

    @classmethod
    def of_record(cls, options: Mapping[str, Any], folder: object = None) -> "ClassLabel":
        """As `record` wrote it; raises ValueError for more or fewer names than classes."""
        made = cls(**{**options, "class_names": tuple(options["class_names"])})
        if made.class_names and len(made.class_names) != made.num_classes:
            raise ValueError(f"{len(made.class_names)} names of {made.num_classes} classes")
        return made

    @property
    def can_guide(self) -> bool:
        return self.null_class

    def parse(
        self, tensors: Mapping[str, np.ndarray], max_images: int, *, guided: bool = True
    ) -> np.ndarray:
        """The class ids asked for; raises RequestError."""
        given = [name for name in (LABEL, CLASS_NAME) if name in tensors]
        if len(given) != 1:
            found = "both" if given else "neither"
            raise RequestError(
                f"give either {LABEL} (class ids, INT64 [n]) or {CLASS_NAME} (BYTES [n]), got "
                f"{found}"
            )
        wanted = tensors[given[0]]
        if not 1 <= len(wanted) <= max_images:
            raise RequestError(
                f"a request asks for 1 to {max_images} images, got {len(wanted)} in {given[0]}"
            )
        if given == [CLASS_NAME]:
            return np.array([self._id_of(name) for name in wanted], dtype=np.int64)
        bad = wanted[(wanted < 0) | (wanted >= self.num_classes)]
        if len(bad):
            raise RequestError(f"{LABEL} must be 0 to {self.num_classes - 1}, got {bad[0]}")
        return wanted

    def _id_of(self, name: Any) -> int:
        text = text_of(CLASS_NAME, name)
        try:
            return self.class_names.index(text)
        except ValueError:
            known = ", ".join(self.class_names[:_SHOWN])
            known = known or "none (this pipeline's classes have no names)"
            raise RequestError(
                f"{CLASS_NAME} {text[:_SHOWN]!r} is unknown, known are {known}"
            ) from None

    async def encode(
        self, value: np.ndarray, infer: object = None, *, guided: bool
    ) -> tuple[Tensors, Tensors]:
        """The label of each image, [n, 1], and the null class, [1, 1]; no network is needed."""
        null = {LABEL: np.array([[self.num_classes]], dtype=np.int64)}
        return {LABEL: value[:, None]}, null if guided else {}

    def texts(self, value: np.ndarray) -> Tensors:
        """Nothing."""
        return {}

    def pinned(self) -> Tensors:
        """Nothing."""
        return {}

    def request(self, value: np.ndarray) -> Tensors:
        """As ids."""
        return {LABEL: value}

    def answer(self, value: np.ndarray) -> Tensors:
        """Names, or ids where the export was given no names."""
        names = [self.class_names[k] if self.class_names else str(k) for k in value.tolist()]
        return {CLASS_NAME: np.array([name.encode() for name in names], dtype=object)}

    def sample(self, rows: int, generator: np.random.Generator) -> Tensors:
        """Labels [rows, 1], the null class among them."""
        return {LABEL: generator.integers(self.num_classes + self.null_class, size=(rows, 1))}

    def sample_encoder(self, rows: int, generator: np.random.Generator) -> Tensors:
        """Nothing."""
        return {}

    def example(self, images: int) -> Tensors:
        """One class after the other."""
        return {LABEL: np.arange(images) % self.num_classes}

    def record(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self) | {"class_names": list(self.class_names)}

    def described(self) -> dict[str, Any]:
        """Its fields, and what it takes."""
        takes = [spec.name for spec in self.request_inputs]
        return {"kind": self.kind, "takes": takes, **self.record()}
