"""A text per image, which a text encoder turns into conditioning tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flowturbo.conditions.tokens import (
    OpenTokenizer,
    TokenizerRecord,
    Tokens,
    encoder_names,
    encoder_tensors,
)
from flowturbo.contract import INITIAL_NOISE, SEED, Role, Specs, TensorSpec, text_of
from flowturbo.errors import RequestError
from flowturbo.rows import AwaitedInfer, Tensors

PROMPT = "prompt"
NEGATIVE_PROMPT = "negative_prompt"
TRUNCATED = "truncated"
MAX_BYTES = 8192  # of a text
NULL = ""  # the text of the unconditional rows
_TYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int64": np.int64,
}


@dataclass(frozen=True)
class Prompts:
    """The texts of a request, [n] each; `negatives` is empty without guidance.

    `tokens` has each different text once. `rows` and `null_rows` say which of them is whose.
    """

    texts: tuple[str, ...]
    negatives: tuple[str, ...]
    truncated: np.ndarray
    tokens: Tensors
    rows: tuple[int, ...]
    null_rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and a negative prompt for guidance. A request's value is `Prompts`.

    `conditioning` has the name, type and dimensions of each tensor that the text encoder makes.
    `folder` has the tokenizers' files. Without `can_guide` the model is step-distilled and takes no
    guidance.
    """

    tokenizers: tuple[TokenizerRecord, ...]
    conditioning: tuple[tuple[str, str, tuple[int, ...]], ...]
    folder: Path
    can_guide: bool = True

    kind: ClassVar[str] = "prompt"
    asked_by: ClassVar[str] = PROMPT
    unguided_because: ClassVar[str] = "this is a step-distilled model, which takes no guidance"
    request_inputs: ClassVar[Specs] = (
        TensorSpec(PROMPT, np.object_, (-1,), optional=True),
        TensorSpec(NEGATIVE_PROMPT, np.object_, (-1,), optional=True),
    )
    request_outputs: ClassVar[Specs] = (TensorSpec(TRUNCATED, np.bool_, (-1,)),)

    @classmethod
    def of_record(cls, options: Mapping[str, Any], folder: Path) -> "Prompt":
        """As `record` wrote it. The files in `folder` are read at the first use."""
        return cls(
            tokenizers=tuple(map(TokenizerRecord.of_record, options["tokenizers"])),
            conditioning=tuple((n, t, tuple(dims)) for n, t, dims in options["conditioning"]),
            folder=folder,
            can_guide=options["can_guide"],
        )

    @cached_property
    def block_inputs(self) -> Specs:
        return tuple(TensorSpec(name, _TYPES[kind], dims) for name, kind, dims in self.conditioning)

    @cached_property
    def encoder_inputs(self) -> Specs:
        found = []
        for index, record in enumerate(self.tokenizers):
            names = encoder_names(index)[: 1 + record.mask]
            found += [TensorSpec(name, np.int64, (record.length,)) for name in names]
        return tuple(found)

    @cached_property
    def _open(self) -> tuple[OpenTokenizer, ...]:
        return tuple(OpenTokenizer(record, self.folder) for record in self.tokenizers)

    @cached_property
    def _special(self) -> list[str]:
        """The special tokens of all tokenizers, longest first."""
        found = {special for tokenizer in self._open for special in tokenizer.special.values()}
        return sorted(found, key=len, reverse=True)

    def parse(self, tensors: Mapping[str, np.ndarray], max_images: int, *, guided: bool) -> Prompts:
        """The texts asked for, as tokens; raises RequestError.

        One prompt serves all seeds, or all of the initial noise.
        """
        if PROMPT not in tensors:
            raise RequestError(f"give {PROMPT} (a text, BYTES [1] or one per image), got none")
        texts = [_text(PROMPT, entry) for entry in tensors[PROMPT]]
        given = [len(tensors[name]) for name in (SEED, INITIAL_NOISE) if name in tensors]
        count = given[0] if given and len(texts) == 1 else len(texts)
        if not 1 <= count <= max_images:
            raise RequestError(f"a request asks for 1 to {max_images} images, got {count}")
        for text in texts:
            self._check(text)
        negatives = [_text(NEGATIVE_PROMPT, each) for each in tensors.get(NEGATIVE_PROMPT, ())]
        if negatives and not self.can_guide:
            raise RequestError(f"{NEGATIVE_PROMPT} cannot be used: {self.unguided_because}")
        if negatives and not guided:
            raise RequestError(
                f"{NEGATIVE_PROMPT} needs guidance: guidance_scale must not be 1, got "
                f"{negatives[0][:40]!r} without guidance"
            )
        if NEGATIVE_PROMPT in tensors and len(negatives) not in (1, count):
            raise RequestError(
                f"{NEGATIVE_PROMPT} must have one entry, or one per image, {count} here, got "
                f"{len(negatives)}"
            )
        return self._value(texts, negatives or [NULL] * guided, count)

    def _check(self, text: str) -> None:
        content = text
        for special in self._special:
            content = content.replace(special, " ")
        if not any(tokenizer.has_content(content) for tokenizer in self._open):
            what = "an empty text" if not text.strip() else repr(text[:40])
            raise RequestError(f"{PROMPT} must have content besides special tokens, got {what}")

    def _value(self, texts: Sequence[str], negatives: Sequence[str], count: int) -> Prompts:
        different = list(dict.fromkeys([*texts, *negatives]))
        tokens = [self._tokens(text) for text in different]
        rows = [different.index(text) for text in texts]
        null_rows = [different.index(text) for text in negatives]
        cut = np.array([any(each.cut for each in of_text) for of_text in tokens])
        truncated = cut[rows] if not null_rows else cut[rows] | cut[null_rows]
        every = [texts[0]] * count if len(texts) == 1 else texts
        return Prompts(
            texts=tuple(every),
            negatives=tuple([negatives[0]] * count if len(negatives) == 1 else negatives),
            truncated=np.resize(truncated, count) if len(truncated) == 1 else truncated,
            tokens=encoder_tensors(self._open, tokens),
            rows=tuple(rows * count if len(rows) == 1 else rows),
            null_rows=tuple(null_rows),
        )

    def _tokens(self, text: str) -> list[Tokens]:
        return [tokenizer.encode(text) for tokenizer in self._open]

    async def encode(
        self, value: Prompts, infer: AwaitedInfer, *, guided: bool
    ) -> tuple[Tensors, Tensors]:
        """The text encoder's outputs, per image; each different text is encoded once."""
        outputs = await infer(Role.TEXT_ENCODER, value.tokens)
        named = dict(zip([name for name, _, _ in self.conditioning], outputs, strict=True))
        conditioning = {name: array[list(value.rows)] for name, array in named.items()}
        if not guided:
            return conditioning, {}
        return conditioning, {name: array[list(value.null_rows)] for name, array in named.items()}

    def pinned(self) -> Tensors:
        """The tokens of the null prompt."""
        return encoder_tensors(self._open, [self._tokens(NULL)]) if self.can_guide else {}

    def request(self, value: Prompts) -> Tensors:
        """The texts."""
        found = {PROMPT: _texts(value.texts)}
        return found | ({NEGATIVE_PROMPT: _texts(value.negatives)} if value.negatives else {})

    def answer(self, value: Prompts) -> Tensors:
        """Whether a tokenizer had to cut the image's prompt or negative prompt."""
        return {TRUNCATED: value.truncated}

    def sample(self, rows: int, generator: np.random.Generator) -> Tensors:
        """Normal numbers; lengths (int64) from 1 to that of the first tensor."""
        _, _, (longest, *_) = self.conditioning[0]
        found: Tensors = {}
        for name, kind, dims in self.conditioning:
            shape = (rows, *dims)
            if kind == "int64":
                found[name] = generator.integers(1, longest + 1, size=shape)
            else:
                found[name] = generator.standard_normal(shape).astype(_TYPES[kind])
        return found

    def sample_encoder(self, rows: int, generator: np.random.Generator) -> Tensors:
        """Tokens of random words of the vocabulary, from few to too many; first the null prompt."""
        words = self._open[0].some_words(200)
        longest = max(record.length for record in self.tokenizers)
        counts = generator.integers(1, longest + 2, size=rows)
        texts = [" ".join(generator.choice(words, size=count)) for count in counts]
        texts[0] = NULL
        return encoder_tensors(self._open, [self._tokens(text) for text in texts])

    def example(self, images: int) -> Tensors:
        """One word of the vocabulary per image."""
        words = self._open[0].some_words(images)
        return {PROMPT: _texts([words[k % len(words)] for k in range(images)])}

    def record(self) -> dict[str, Any]:
        """Its fields without the folder."""
        return {
            "tokenizers": [asdict(each) for each in self.tokenizers],
            "conditioning": [list(each) for each in self.conditioning],
            "can_guide": self.can_guide,
        }

    def described(self) -> dict[str, Any]:
        """What it takes, and the longest text in tokens."""
        takes = [spec.name for spec in self.request_inputs[: 1 + self.can_guide]]
        longest = max(each.length for each in self.tokenizers)
        return {"kind": self.kind, "takes": takes, "text_length": longest, "max_bytes": MAX_BYTES}


def _text(name: str, entry: Any) -> str:
    size = len(entry if isinstance(entry, bytes) else str(entry).encode(errors="replace"))
    if size > MAX_BYTES:
        raise RequestError(f"{name} must have at most {MAX_BYTES} bytes, got {size}")
    return text_of(name, entry)


def _texts(texts: Sequence[str]) -> np.ndarray:
    return np.array(list(texts), dtype=object)
