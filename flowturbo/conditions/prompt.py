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
from flowturbo.contract import (
    IMAGE,
    IMAGE_FILE,
    INITIAL_NOISE,
    SEED,
    Role,
    Specs,
    TensorSpec,
    check_entries,
    text_of,
)
from flowturbo.errors import RequestError
from flowturbo.rows import AwaitedInfer, Tensors

PROMPT = "prompt"
NEGATIVE_PROMPT = "negative_prompt"
PROMPT_TO = "prompt_to"
MIX = "mix"
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

    `tokens` has each different text once. `rows`, `to_rows` and `null_rows` say which of them is
    whose. The conditioning of an image is mixed of both its texts, with the share `mix` [n] of the
    second; without `to_rows` there is no second.
    """

    texts: tuple[str, ...]
    negatives: tuple[str, ...]
    truncated: np.ndarray
    tokens: Tensors
    rows: tuple[int, ...]
    null_rows: tuple[int, ...]
    to_rows: tuple[int, ...] = ()
    mix: np.ndarray | None = None
    texts_to: tuple[str, ...] = ()

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
        TensorSpec(PROMPT_TO, np.object_, (-1,), optional=True),
        TensorSpec(MIX, np.float32, (-1,), optional=True),
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

        One prompt serves all seeds, all of the initial noise, or all images to edit.
        """
        if PROMPT not in tensors:
            raise RequestError(f"give {PROMPT} (a text, BYTES [1] or one per image), got none")
        texts = [_text(PROMPT, entry) for entry in tensors[PROMPT]]
        counted = (SEED, INITIAL_NOISE, IMAGE, IMAGE_FILE)
        given = [len(tensors[name]) for name in counted if name in tensors]
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
        if NEGATIVE_PROMPT in tensors:
            check_entries(NEGATIVE_PROMPT, negatives, count)
        second = self._second(tensors, count)
        return self._value(texts, negatives or [NULL] * guided, count, second, tensors.get(MIX))

    def _second(self, tensors: Mapping[str, np.ndarray], count: int) -> list[str]:
        """The texts to lead to; empty without any."""
        if (PROMPT_TO in tensors) != (MIX in tensors):
            given, lacking = (PROMPT_TO, MIX) if PROMPT_TO in tensors else (MIX, PROMPT_TO)
            raise RequestError(f"{given} needs {lacking}: give both or none")
        if PROMPT_TO not in tensors:
            return []
        texts = [_text(PROMPT_TO, entry) for entry in tensors[PROMPT_TO]]
        check_entries(PROMPT_TO, texts, count)
        check_entries(MIX, tensors[MIX], count)
        for text in texts:
            self._check(text, PROMPT_TO)
        wrong = tensors[MIX][~((tensors[MIX] >= 0) & (tensors[MIX] <= 1))]
        if len(wrong):
            raise RequestError(f"{MIX} must be 0 to 1, got {wrong[0]:g}")
        return texts * count if len(texts) == 1 else texts

    def _check(self, text: str, name: str = PROMPT) -> None:
        content = text
        for special in self._special:
            content = content.replace(special, " ")
        if not any(tokenizer.has_content(content) for tokenizer in self._open):
            what = "an empty text" if not text.strip() else repr(text[:40])
            raise RequestError(f"{name} must have content besides special tokens, got {what}")

    def _value(
        self,
        texts: Sequence[str],
        negatives: Sequence[str],
        count: int,
        second: Sequence[str] = (),
        mix: np.ndarray | None = None,
    ) -> Prompts:
        different = list(dict.fromkeys([*texts, *negatives, *second]))
        tokens = [self._tokens(text) for text in different]
        rows = [different.index(text) for text in texts]
        null_rows = [different.index(text) for text in negatives]
        cut = np.array([any(each.cut for each in of_text) for of_text in tokens])
        truncated = cut[rows] if not null_rows else cut[rows] | cut[null_rows]
        to_rows = [different.index(text) for text in second]
        if to_rows:
            truncated = np.resize(truncated, count) | cut[to_rows]
        every = [texts[0]] * count if len(texts) == 1 else texts
        return Prompts(
            texts=tuple(every),
            negatives=tuple([negatives[0]] * count if len(negatives) == 1 else negatives),
            truncated=np.resize(truncated, count) if len(truncated) == 1 else truncated,
            tokens=encoder_tensors(self._open, tokens),
            rows=tuple(rows * count if len(rows) == 1 else rows),
            null_rows=tuple(null_rows),
            to_rows=tuple(to_rows),
            mix=None if mix is None else np.resize(mix, count),
            texts_to=tuple(second),
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
        if value.mix is not None:
            for name, array in named.items():
                second = array[list(value.to_rows)]
                conditioning[name] = _mixed(conditioning[name], second, value.mix)
        if not guided:
            return conditioning, {}
        return conditioning, {name: array[list(value.null_rows)] for name, array in named.items()}

    def texts(self, value: Prompts) -> Tensors:
        """The tokens of its different texts."""
        return value.tokens

    def pinned(self) -> Tensors:
        """The tokens of the null prompt."""
        return encoder_tensors(self._open, [self._tokens(NULL)]) if self.can_guide else {}

    def request(self, value: Prompts) -> Tensors:
        """The texts."""
        found = {PROMPT: _texts(value.texts)}
        if value.mix is not None:
            found |= {PROMPT_TO: _texts(value.texts_to), MIX: value.mix}
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
        unguided = () if self.can_guide else (NEGATIVE_PROMPT,)
        takes = [spec.name for spec in self.request_inputs if spec.name not in unguided]
        longest = max(each.length for each in self.tokenizers)
        return {"kind": self.kind, "takes": takes, "text_length": longest, "max_bytes": MAX_BYTES}


def _mixed(first: np.ndarray, second: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """(1 - mix) first + mix second, [n, ...] each. Lengths (integers) are those of the longer."""
    if first.dtype == np.int64:
        return np.maximum(first, second)
    share = mix.astype(np.float32).reshape(-1, *[1] * (first.ndim - 1))
    mixed: np.ndarray = ((1 - share) * first + share * second).astype(first.dtype)
    return mixed


def _text(name: str, entry: Any) -> str:
    size = len(entry if isinstance(entry, bytes) else str(entry).encode(errors="replace"))
    if size > MAX_BYTES:
        raise RequestError(f"{name} must have at most {MAX_BYTES} bytes, got {size}")
    return text_of(name, entry)


def _texts(texts: Sequence[str]) -> np.ndarray:
    return np.array(list(texts), dtype=object)
