"""A hook for a content filter of your own; none is shipped.

A filter is an object with one or both of these methods. Each returns None, or why it refuses:

    async def before(self, asked: Generation) -> str | None
    async def after(self, asked: Generation, image: bytes) -> str | None

`asked` has the fields of the request (flowturbo.gateway.fields), `image` is an image file. `after`
also sees each partial image before it is sent.
"""

import importlib
from typing import Any

from flowturbo.gateway.answers import Refused
from flowturbo.gateway.fields import Generation

_CODE = "content_policy_violation"


class Filter:
    """Calls the methods that `hook` has."""

    def __init__(self, hook: Any = None) -> None:
        self._before = getattr(hook, "before", None)
        self._after = getattr(hook, "after", None)
        if hook is not None and not (self._before or self._after):
            raise ValueError(f"the filter {hook!r} has neither before nor after")

    @classmethod
    def load(cls, name: str) -> "Filter":
        """The filter that `package.module:factory` makes. Raises ValueError."""
        module, _, factory = name.partition(":")
        try:
            return cls(getattr(importlib.import_module(module), factory)())
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the filter {name!r} must be MODULE:FACTORY ({error})") from error

    async def before(self, asked: Generation) -> None:
        """Raises Refused if the filter refuses the request."""
        if self._before and (reason := await self._before(asked)):
            raise Refused(400, reason, code=_CODE)

    @property
    def sees_images(self) -> bool:
        """Whether the hook looks at images."""
        return self._after is not None

    async def after(self, asked: Generation, image: bytes) -> None:
        """Raises Refused if the filter refuses the image."""
        if self._after and (reason := await self._after(asked, image)):
            raise Refused(400, reason, code=_CODE)
