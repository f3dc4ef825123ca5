"""Text to token ids, as the text encoders of a pipeline read them.

The library is Hugging Face's `tokenizers`. The export writes its files beside the text encoder.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowturbo.errors import RepositoryError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TokenizerRecord:
    """One tokenizer: its `file`, and the rows of its text encoder's inputs.

    A text becomes `length` ids: too long ones are cut, short ones end with `pad`. `template` has
    what stands before and after the text in a chat. With `mask` the text encoder also reads which
    ids are not padding.
    """

    file: str
    length: int
    pad: int
    template: tuple[str, str] | None = None
    mask: bool = False

    @classmethod
    def of_record(cls, options: Mapping[str, Any]) -> "TokenizerRecord":
        """As `dataclasses.asdict` wrote it."""
        template = options["template"]
        return cls(**{**options, "template": tuple(template) if template else None})


@dataclass(frozen=True)
class Tokens:
    """A text as token ids: `ids` and `mask` [length] int64.

    `cut` is whether the text was too long.
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: bool


class OpenTokenizer:
    """A loaded tokenizer. Special tokens in a text are plain text: they cannot end its template."""

    def __init__(self, record: TokenizerRecord, folder: Path) -> None:
        self.record = record
        self._tokenizer = _load(folder / record.file)
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special = {number: token.content for number, token in added if token.special}
        before, after = record.template or ("", "")
        start = max(
            (before.rfind(s) + len(s) for s in self.special.values() if s in before), default=0
        )
        end = min((after.find(s) for s in self.special.values() if s in after), default=len(after))
        # Special tokens separate texts: what stands between two of them is tokenized alone.
        self._before, self._after = self._fixed(before[:start]), self._fixed(after[end:])
        self._beside = before[start:], after[:end]
        self._tokenizer.encode_special_tokens = True
        if record.template is None:
            self._tokenizer.enable_truncation(record.length)

    def _fixed(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, text: str) -> Tokens:
        """The ids of `text`."""
        record = self.record
        encoding = self._tokenizer.encode(text.join(self._beside))
        content = encoding.ids
        cut = bool(encoding.overflowing)
        if record.template is not None:
            content = [*self._before, *content, *self._after]
            cut = len(content) > record.length
            content = content[: record.length]
        ids = np.full(record.length, record.pad, dtype=np.int64)
        ids[: len(content)] = content
        mask = (np.arange(record.length) < len(content)).astype(np.int64)
        return Tokens(ids, mask, cut)

    def has_content(self, text: str) -> bool:
        """Whether a token other than a special one stands for a part of `text`."""
        return bool(text.strip()) and any(
            number not in self.special for number in self._fixed(text)
        )

    def some_words(self, count: int) -> list[str]:
        """Words of the vocabulary that are not empty."""
        words = (self._tokenizer.decode([k]) for k in range(self._tokenizer.get_vocab_size()))
        found = (word.strip() for word in words if self.has_content(word))
        return list(itertools.islice(found, count))


def _load(path: Path) -> "Tokenizer":
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RepositoryError(
            f"{path} needs a package that is not installed: pip install tokenizers"
        ) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise RepositoryError(f"{path} is no tokenizer: {error}; export again") from error


def encoder_names(index: int) -> tuple[str, str]:
    """The text encoder's inputs for tokenizer number `index`, from 0: ids and mask."""
    return f"input_ids_{index + 1}", f"attention_mask_{index + 1}"


def encoder_tensors(
    tokenizers: Sequence[OpenTokenizer], texts: Sequence[Sequence[Tokens]]
) -> dict[str, np.ndarray]:
    """The inputs of a text encoder for `texts`, each as tokens of every tokenizer."""
    found = {}
    for index, tokenizer in enumerate(tokenizers):
        ids, mask = encoder_names(index)
        found[ids] = np.stack([tokens[index].ids for tokens in texts])
        if tokenizer.record.mask:
            found[mask] = np.stack([tokens[index].mask for tokens in texts])
    return found
