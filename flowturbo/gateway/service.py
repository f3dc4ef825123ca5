"""The image service as the gateway sees it: from fields to images, by the client."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flowturbo_client import AsyncFlowTurboClient, FlowTurboError, Update
from flowturbo_client import Generation as Made
from flowturbo_client.verbs import EDIT_STRENGTH

from flowturbo.errors import RequestError
from flowturbo.gateway.answers import Refused, refusal_of
from flowturbo.gateway.fields import Edit, Generation
from flowturbo.gateway.masks import white_where_transparent
from flowturbo.latents import BASE64
from flowturbo.pictures import Picture
from flowturbo.presets import parsed
from flowturbo.solver.calls import Network
from flowturbo.solver.program import compile_program
from flowturbo.solver.schedule import Schedule

_DESCRIBED_S = 5.0  # how long the descriptions of the pipelines are kept


@dataclass(frozen=True)
class Task:
    """One checked request: `model` describes its pipeline, `arguments` are the client's."""

    fields: Generation
    model: Mapping[str, Any]
    arguments: Mapping[str, Any]


class ImageService:
    """Asks the service at `urls`. `aliases` are other names of pipelines."""

    def __init__(self, urls: Sequence[str], timeout_s: float, aliases: Mapping[str, str]) -> None:
        # A caller is told at once that the service is busy: it knows best whether to wait.
        others = len(urls) - 1
        self._client = AsyncFlowTurboClient(urls, timeout_s=timeout_s, retries=others)
        self._aliases = aliases
        self._models: dict[str, dict[str, Any]] = {}
        self._until = 0.0

    async def close(self) -> None:
        """Closes the connection."""
        await self._client.close()

    async def is_ready(self) -> bool:
        """Whether a server answers and has its models ready."""
        return await self._client.is_ready()

    async def models(self) -> dict[str, dict[str, Any]]:
        """The pipelines' descriptions by each name that requests may give. Raises Refused."""
        if time.monotonic() > self._until:
            try:
                self._models = {each["name"]: each for each in await self._client.pipelines()}
            except FlowTurboError as error:
                raise refusal_of(error) from error
            for name, of in self._aliases.items():
                if of in self._models:
                    self._models.setdefault(name, self._models[of])
            self._until = time.monotonic() + _DESCRIBED_S
        return self._models

    async def model(self, name: str | None) -> dict[str, Any]:
        """The description of a pipeline, or of the default one. Raises Refused."""
        known = await self.models()
        for each, described in known.items():
            if each == name or (name is None and described["default"]):
                return described
        told = f"model {name!r} is unknown, known are {', '.join(known)}"
        raise Refused(404, told, param="model", code="model_not_found")

    async def task(self, fields: Generation, caller: str | None) -> Task:
        """What to ask the service for. Raises Refused."""
        model = await self.model(fields.model)
        arguments: dict[str, Any] = {
            "pipeline": model["name"],
            "seeds": fields.seeds(),
            "schedule": fields.wanted_schedule,
            "guidance_scale": fields.guidance_scale,
            "negative_prompts": fields.negative_prompt,
            "size": fields.wanted_size,
            "output_format": fields.form + BASE64,
            "output_quality": fields.output_compression,
            "strip_metadata": bool(fields.strip_metadata),
            "caller": caller,
            **_condition(fields, model),
        }
        if isinstance(fields, Edit):
            # In a thread: masks are decoded.
            arguments |= await asyncio.to_thread(_edit, fields, model)
        return Task(fields, model, {k: v for k, v in arguments.items() if v is not None})

    async def generate(self, task: Task) -> Made:
        """The images. Raises Refused."""
        try:
            return await self._client.generate(**task.arguments)
        except FlowTurboError as error:
            raise refusal_of(error) from error

    async def stream(self, task: Task) -> AsyncIterator[Update]:
        """Some images on the way, as many as the task asks for or fewer, then the images.

        Raises Refused.
        """
        partial = task.fields.partial_images or 0
        steps = _steps(task)
        every = max(1, steps // (partial + 1))
        shown = 0
        updates = self._client.stream(preview_every=every, **task.arguments)
        try:
            async for update in updates:
                due = (shown + 1) * steps / (partial + 1)
                if update.final:
                    yield update
                elif shown < partial and update.step >= due:
                    shown += 1
                    yield update
        except FlowTurboError as error:
            raise refusal_of(error) from error
        finally:
            await updates.aclose()  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def evaluations(schedule: str) -> int:
    """How often `schedule` evaluates the predictor."""
    parsed_schedule = Schedule.parse(schedule)
    if parsed_schedule.learned:
        return len(parsed_schedule)
    return compile_program(parsed_schedule).evaluations(Network.PREDICTOR)


def _condition(fields: Generation, model: Mapping[str, Any]) -> dict[str, Any]:
    """What to show, n times: a prompt, or a class by id or name."""
    kind = model["condition"]["kind"]
    if kind == "class_label":
        label = fields.prompt if fields.label is None else fields.label
        named = bool(model["condition"]["class_names"])
        if isinstance(label, str) and label.isdecimal() and len(label) < 19 and not named:
            label = int(label)
        return {"labels": [label] * fields.count}
    if fields.label is not None:
        raise Refused(400, f"model {model['name']} takes a prompt and no label", param="label")
    return {"prompts": [fields.prompt] * fields.count}


def _edit(fields: Edit, model: Mapping[str, Any]) -> dict[str, Any]:
    if not model["edits"]:
        raise Refused(400, f"model {model['name']} takes no images", param="image")
    try:
        Picture.of_file("image", fields.image)  # reads its header only
        mask = white_where_transparent(fields.mask) if fields.mask is not None else None
    except RequestError as error:
        raise Refused(400, str(error), param=str(error).partition(" ")[0]) from error
    strength = fields.strength
    if mask is None and strength is None:
        strength = EDIT_STRENGTH
    return {"image": fields.image, "mask": mask, "strength": strength, "feather": fields.feather}


def _steps(task: Task) -> int:
    """The steps of the task's schedule; of two that may serve it, of the shorter."""
    name = task.fields.wanted_schedule or task.model["default_schedule"]
    text = task.model["presets"].get(name, name)
    try:
        schedule = parsed({name: text})[name]
    except RequestError:
        return 1  # the service refuses it with its reasons
    other = schedule.otherwise
    return min(len(schedule), len(other)) if other else len(schedule)
