"""The documentation is short and plain: the README has few words, sentences are short."""

import re
from collections.abc import Iterator

import pytest
from support import ROOT

pytestmark = pytest.mark.unit

DOCUMENTS = [
    path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "client/README.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "docs/benchmarks/study.md",
    )
    if path.exists()
]
MAX_README_WORDS = 900
MAX_SENTENCE_WORDS = 25
MAX_LONG_SHARE = 0.03

_LIST_ITEM = re.compile(r"\s*([-*+]|\d+[.)])\s+")
_NO_PROSE = re.compile(r"\s*($|#|\||<!--)")  # blank lines, headings, tables, comments
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")


def test_the_readme_is_short() -> None:
    words = len((ROOT / "README.md").read_text().split())  # as `wc -w` counts
    assert words <= MAX_README_WORDS


def test_sentences_are_short() -> None:
    counts = {
        f"{path.relative_to(ROOT)}: {sentence}": count_words(sentence)
        for path in DOCUMENTS
        for sentence in sentences(path.read_text())
    }
    long = [text for text, words in counts.items() if words > MAX_SENTENCE_WORDS]
    share = len(long) / len(counts)
    assert share <= MAX_LONG_SHARE, "\n".join([f"{share:.1%} are too long:", *long])


@pytest.mark.parametrize(
    ("markdown", "found"),
    [
        pytest.param("One. Two! Three?", ["One.", "Two!", "Three?"], id="ends"),
        pytest.param("Version 1.5 of x.y is\nhere.", ["Version 1.5 of x.y is here."], id="dots"),
        pytest.param("(One.) Two.", ["(One.", "Two."], id="brackets"),
        pytest.param("Do:\n\n- this\n  now\n- that\n", ["Do:", "this now", "that"], id="list"),
        pytest.param("Run `a b. C` here.", ["Run Code here."], id="inline code"),
        pytest.param("See [the *page*](a/b.md).", ["See the page."], id="link"),
        pytest.param("# A title\n\nText.\n", ["Text."], id="heading"),
        pytest.param("Text.\n\n| a. B | c |\n|---|---|\n", ["Text."], id="table"),
        pytest.param("Text:\n\n```sh\nls. Ls\n```\nMore.", ["Text:", "More."], id="fenced code"),
        pytest.param("Text:\n\n    x = y\n\nMore.", ["Text:", "More."], id="indented code"),
    ],
)
def test_the_counter_finds_sentences(markdown: str, found: list[str]) -> None:
    assert sentences(markdown) == found


def test_the_counter_counts_words() -> None:
    assert count_words("One + one is 2 - or Code.") == 6


def sentences(markdown: str) -> list[str]:
    """The sentences of the prose, without code, tables, headings and the targets of links."""
    return [
        sentence
        for paragraph in _paragraphs(markdown)
        for sentence in re.split(_SENTENCE_END, _plain(paragraph))
    ]


def count_words(sentence: str) -> int:
    """A word has a letter or a digit: a dash alone is none."""
    return sum(any(map(str.isalnum, word)) for word in sentence.split())


def _paragraphs(markdown: str) -> Iterator[str]:
    """Paragraphs of prose as one line each; a list item is a paragraph."""
    lines: list[str] = []
    in_fence = False
    for line in [*markdown.splitlines(), ""]:
        is_fence = line.lstrip().startswith("```")
        in_fence ^= is_fence
        item = re.match(_LIST_ITEM, line)
        # Indented by four behind a blank line it is code.
        is_code = in_fence or is_fence or (not lines and not item and line.startswith("    "))
        ends = is_code or item or re.match(_NO_PROSE, line)
        if ends and lines:
            yield " ".join(lines)
            lines = []
        if item and not is_code:
            lines = [line[item.end() :].strip()]
        elif not ends:
            lines.append(line.strip())


def _plain(paragraph: str) -> str:
    """Inline code as one word, links and images as their text, no marks of emphasis."""
    text = re.sub(r"(`+).+?\1", "Code", paragraph)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\*+|<[^>]+>", "", text)
