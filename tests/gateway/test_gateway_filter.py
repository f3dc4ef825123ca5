"""A content filter and the quota of a key, before a real service."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from bench.gateway import running_gateway
from flowturbo.gateway.keys import main
from flowturbo.serving.tritonserver import ServerAddress

QUOTA = 2  # images per minute; every request asks for as many
FILTER = """
class ByUser:
    async def before(self, asked):
        return "no requests of mallory" if asked.user == "mallory" else None

    async def after(self, asked, image):
        return "no images for eve" if asked.user == "eve" else None
"""


@pytest.fixture
def api(
    glyphs_server: ServerAddress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[openai.OpenAI]:
    keys = ["--keys", str(tmp_path / "keys.json")]
    (tmp_path / "by_user.py").write_text(FILTER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["add", "alice", *keys, "--images-per-minute", str(QUOTA)]) == 0
    key = capsys.readouterr().out.strip()
    with running_gateway(glyphs_server.grpc, *keys, "--filter", "by_user:ByUser") as gateway:
        yield openai.OpenAI(base_url=f"{gateway.address}/v1", api_key=key, max_retries=0)


def ask(api: openai.OpenAI, user: str, partial_images: int | None) -> None:
    options = {"prompt": "A", "model": "glyphs", "n": QUOTA, "user": user}
    if partial_images is None:
        api.images.generate(**options)  # type: ignore[call-overload]
        return
    for _ in api.images.generate(  # type: ignore[call-overload]
        **options, stream=True, partial_images=partial_images
    ):
        pass


@pytest.mark.parametrize("partial_images", [None, 0, 2])
def test_images_count_that_the_filter_refuses(
    api: openai.OpenAI, partial_images: int | None
) -> None:
    with pytest.raises(openai.BadRequestError, match="no requests of mallory"):
        ask(api, "mallory", partial_images)
    with pytest.raises(openai.APIError, match="no images for eve"):  # computed, so they count
        ask(api, "eve", partial_images)
    with pytest.raises(openai.RateLimitError, match="2 images per minute"):
        ask(api, "alice", partial_images)


def test_images_of_a_refused_request_are_given_back(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="H999"):
        api.images.generate(prompt="A", model="glyphs", n=QUOTA, extra_body={"schedule": "H999"})
    ask(api, "alice", 2)
    with pytest.raises(openai.RateLimitError):
        ask(api, "alice", None)
