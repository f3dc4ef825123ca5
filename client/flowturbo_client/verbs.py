"""Requests with an image, in the words of their purpose: both clients have these methods."""

from typing import Any

from .pictures import Pictures, noise_between
from .protocol import latent_shape
from .tensors import Labels, repeated

EDIT_STRENGTH = 0.6  # of an edit that gives none


def interpolated(
    pipelines: list[dict[str, Any]],
    ends: tuple[int, int],
    count: int,
    labels: Labels | None,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of `generate` for an interpolation between the seeds `ends`."""
    shape = latent_shape(pipelines, more.get("pipeline"), more.get("size"))
    # Not a display: with it, an `initial_noise` in `more` would silently replace the noise.
    found = dict(initial_noise=noise_between(*ends, count, shape), **more)
    if labels is not None:
        found["labels"] = repeated(labels, count)
    if more.get("prompts_to") is not None:
        found.setdefault("mix", [k / (count - 1) for k in range(count)])
    return found


class Verbs:
    """Methods over `generate`; of the asynchronous client they return what is to be awaited."""

    generate: Any

    def edit(
        self,
        image: Pictures,
        labels: Labels | None = None,
        *,
        strength: float = EDIT_STRENGTH,
        **more: Any,
    ) -> Any:
        """Change `image` towards `labels`, or towards `prompts`: SDEdit.

        `strength` in (0, 1] is the share of the schedule's noise that is added: little keeps the
        image, 1 ignores it. `more` are arguments of `generate`.
        """
        return self.generate(labels, image=image, strength=strength, **more)

    def inpaint(
        self, image: Pictures, mask: Pictures, labels: Labels | None = None, **more: Any
    ) -> Any:
        """Repaint `image` where `mask` is white; other pixels stay as they are.

        `mask` "alpha" repaints where the image is transparent.
        """
        return self.generate(labels, image=image, mask=mask, **more)

    def vary(
        self, image: Pictures, labels: Labels | None = None, *, strength: float = 0.7, **more: Any
    ) -> Any:
        """Make variations of `image`: edits with other seeds.

        One image serves all labels, or all seeds of one prompt.
        """
        return self.generate(labels, image=image, strength=strength, **more)

    def invert(self, image: Pictures, labels: Labels | None = None, **more: Any) -> Any:
        """Return the noise of `image` as `latents`: `generate` with it as `initial_noise`.

        Guidance is off unless `guidance_scale` is given. Then use the same scale for both.
        """
        return self.generate(labels, image=image, invert=True, outputs=("latent",), **more)
