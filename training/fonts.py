"""The free Debian fonts that the glyphs data set is rendered from."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_ROOT = Path("/usr/share/fonts")
APT_PACKAGES = """
fonts-b612 fonts-cabin fonts-cantarell fonts-comfortaa fonts-crosextra-caladea
fonts-crosextra-carlito fonts-dejavu-core fonts-dejavu-extra fonts-firacode fonts-freefont-ttf
fonts-hack fonts-inconsolata fonts-jetbrains-mono fonts-junicode fonts-lato fonts-liberation
fonts-linuxlibertine fonts-noto-core fonts-open-sans fonts-play fonts-quicksand
fonts-roboto-unhinted
"""

# Families with plain upright Latin letters and digits. The Noto families are those with Latin.
_FAMILIES = (
    "B612|B612Mono|Cabin|Cantarell|Comfortaa|Caladea|Carlito|"
    "DejaVuSans|DejaVuSansCondensed|DejaVuSansMono|DejaVuSerif|DejaVuSerifCondensed|FiraCode|"
    "FreeMono|FreeSans|FreeSerif|Hack|Inconsolata|JetBrainsMono|JunicodeTwoBeta|Lato|"
    "LiberationMono|LiberationSans|LiberationSansNarrow|LiberationSerif|LinBiolinum|LinLibertine|"
    "NotoSans|NotoSerif|NotoSansDisplay|NotoSerifDisplay|NotoSansMono|OpenSans|Play|Quicksand|"
    "Roboto|RobotoCondensed"
)
_STYLES = "Regular|Medium|SemiBold|Semibold|Bold|ExtraBold|Heavy|Black|Italic|BoldItalic|R|RB"
_NAME = re.compile(rf"({_FAMILIES})(-?({_STYLES}))?|LinBiolinum_(R|RB)|LinLibertine_(R|RB)")

# Pairs that some fonts draw alike. Such a font would make the two classes look like one.
_LOOKALIKES = (("0", "O"), ("1", "I"), ("5", "S"), ("2", "Z"), ("8", "B"))
_MAX_ALIKE = 0.80  # intersection over union


def font_paths(root: Path = FONT_ROOT) -> list[Path]:
    """Listed font files under `root` with distinct letters and digits, sorted by name.

    Raises FileNotFoundError if there are fewer than 50. It names the packages to install.
    """
    found = [p for p in root.rglob("*.[to]tf") if _NAME.fullmatch(p.stem)]
    unique = {p.stem: p for p in sorted(found)}
    usable = [p for _, p in sorted(unique.items()) if not any(_alike(p))]
    if len(usable) < 50:
        raise FileNotFoundError(
            f"{len(usable)} usable fonts under {root}, at least 50 are needed: "
            f"apt-get install --no-install-recommends {' '.join(APT_PACKAGES.split())}"
        )
    return usable


def _alike(path: Path) -> Iterator[bool]:
    font = ImageFont.truetype(str(path), 64)
    for first, second in _LOOKALIKES:
        a, b = _silhouette(font, first), _silhouette(font, second)
        yield float((a & b).sum() / max((a | b).sum(), 1)) > _MAX_ALIKE


def _silhouette(font: ImageFont.FreeTypeFont, text: str) -> np.ndarray:
    """The glyph, centred on a 128 x 128 canvas, as booleans (true is ink)."""
    canvas = Image.new("L", (128, 128))
    ImageDraw.Draw(canvas).text((64, 64), text, font=font, fill=255, anchor="mm")
    return np.asarray(canvas) > 127


if __name__ == "__main__":
    print(" ".join(APT_PACKAGES.split()))
