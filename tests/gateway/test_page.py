"""The web page in a real browser, before a real service."""

import base64
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from bench.browser import chromium
from bench.gateway import running_gateway
from flowturbo.gateway.keys import main as keys

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Any, gateway: str) -> Iterator[Page]:
    context = browser.new_context(viewport=PHONE, permissions=["clipboard-read", "clipboard-write"])
    found, wrong = context.new_page(), []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    found.goto(gateway)
    expect(found.get_by_label("Model")).to_have_value(re.compile("."))
    yield found
    context.close()
    # A refused request is told on the console too.
    assert [each for each in wrong if "status of 4" not in each] == []


def shown(page: Page, index: int = 0) -> np.ndarray:
    source = page.locator("#pictures img").nth(index).get_attribute("src")
    assert source
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def made(page: Page) -> None:
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=30_000)


def test_generate_and_watch_it_form(page: Page) -> None:
    page.get_by_label("Model").select_option("scenes")
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_label("Schedule", exact=True).fill("A8")
    page.get_by_label("Seed").fill("3")
    page.evaluate(
        """() => {
          window.sources = [];
          const seen = (all) => all.forEach((each) => window.sources.push(each.target.src));
          new MutationObserver(seen).observe(document.getElementById("pictures"),
            { subtree: true, attributes: true, attributeFilter: ["src"] });
        }"""
    )
    made(page)
    # Three on the way, and the image. A busy service may drop some on the way.
    count = page.evaluate("window.sources.length")
    assert 2 <= count <= 4
    assert page.evaluate("new Set(window.sources).size") == count
    expect(page.locator("figcaption")).to_have_text(
        re.compile(r"^A8: 8 evaluations, \d+ ms, seed 3$")
    )


def test_compare_schedules_from_the_same_noise(page: Page, api: openai.OpenAI) -> None:
    page.get_by_label("Model").select_option("glyphs")
    page.get_by_label("Class", exact=True).select_option("B")
    page.get_by_label("Compare schedules").check()
    page.get_by_label("Schedules to compare").fill("A4, H8")
    made(page)
    captions = page.locator("figcaption").all_inner_texts()
    assert [text.partition(":")[0] for text in captions] == ["A4", "H8"]
    seeds = {text.rpartition(" ")[2] for text in captions}
    assert len(seeds) == 1
    extra = {"label": "B", "seed": int(seeds.pop()), "schedule": "H8"}
    known = api.images.generate(prompt=openai.omit, model="glyphs", extra_body=extra)  # type: ignore[call-overload]
    with Image.open(io.BytesIO(base64.b64decode(known.data[0].b64_json))) as image:
        assert np.array_equal(shown(page, 1), np.asarray(image.convert("RGB"), dtype=int))


def test_edit_and_inpaint_by_mouse_and_by_keyboard(page: Page, tmp_path: Path) -> None:
    page.get_by_label("Model").select_option("glyphs")
    made(page)
    first = shown(page)
    page.get_by_role("button", name="Start from this").click()
    expect(page.get_by_label("Repaint a part")).to_be_checked()
    made_error = page.get_by_role("alert")
    page.get_by_role("button", name="Make it").click()
    expect(made_error).to_have_text("paint what to repaint first")
    canvas = page.locator("#canvas")
    box = canvas.bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()
    made(page)
    changed = (shown(page) != first).any(2)
    assert changed[:, 40:].any() and not changed[:, :32].any()
    page.get_by_role("button", name="Clear the mask").click()
    canvas.focus()
    for key in ["ArrowLeft"] * 15 + ["Space"]:
        page.keyboard.press(key)
    made(page)
    changed = (shown(page) != first).any(2)
    assert changed[:, :32].any() and not changed[:, 40:].any()
    path = tmp_path / "source.png"
    Image.fromarray(first.astype(np.uint8)).save(path)
    page.get_by_label("Change an image").check()
    page.get_by_label("Image to start from").first.set_input_files(path)
    page.get_by_label("Strength").fill("0.3")
    made(page)
    assert 0 < np.abs(shown(page) - first).mean() < 60
    page.get_by_label("Create", exact=True).check()
    page.locator("#history button").first.click()
    expect(page.get_by_label("Change an image")).to_be_checked()
    expect(page.get_by_label("Strength")).to_have_value("0.3")
    expect(page.get_by_role("status")).to_contain_text("Choose the image")


def test_errors_are_shown_and_the_form_stays_usable(page: Page) -> None:
    page.get_by_label("Model").select_option("glyphs")
    page.get_by_label("Schedule", exact=True).fill("Q7")
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_role("alert")).to_contain_text("unknown step")
    expect(page.locator("figure")).to_have_count(0)
    page.get_by_label("Schedule", exact=True).fill("")
    made(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_stop(page: Page) -> None:
    page.get_by_label("Model").select_option("scenes")
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_label("Schedule", exact=True).fill("H100")
    page.get_by_role("button", name="Make it").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")


def test_history_gives_the_settings_back(page: Page) -> None:
    page.get_by_label("Model").select_option("glyphs")
    page.get_by_label("Class", exact=True).select_option("C")
    page.get_by_label("Seed").fill("5")
    made(page)
    first = shown(page)
    page.get_by_label("Class", exact=True).select_option("D")
    page.get_by_label("Seed").fill("")
    made(page)
    page.reload()
    page.get_by_role("button", name="class C, seed 5").click()
    expect(page.get_by_label("Class", exact=True)).to_have_value("C")
    made(page)
    assert np.array_equal(shown(page), first)
    page.get_by_role("button", name="Forget all").click()
    expect(page.get_by_label("History")).to_be_hidden()


def test_copies_run(page: Page, tmp_path: Path) -> None:
    page.get_by_label("Model").select_option("scenes")
    page.get_by_label("Prompt", exact=True).fill('it\'s a "red" circle')
    page.get_by_label("Seed").fill("3")
    made(page)
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.get_by_role("status")).to_have_text("Copied.")
    text = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert '"seed":3' in done.stdout
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })"
    )  # as by plain http
    page.get_by_role("button", name="Copy as Python").click()
    expect(page.get_by_role("status")).to_have_text("Copied.")
    page.evaluate("delete navigator.clipboard")
    code = page.evaluate("navigator.clipboard.readText()")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "image.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB"), dtype=int), shown(page))


def test_keys(browser: Any, glyphs_server: Any, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "keys.json"
    assert keys(["add", "alice", "--keys", str(file)]) == 0
    key = capsys.readouterr().out.strip()
    with running_gateway(glyphs_server.grpc, "--keys", str(file)) as gateway:
        page = browser.new_page(viewport=PHONE)
        page.goto(gateway.address)
        expect(page.get_by_role("alert")).to_contain_text("send an API key")
        page.get_by_label("Key, kept until this tab closes").fill(key)
        page.get_by_label("Key, kept until this tab closes").press("Tab")
        expect(page.get_by_role("alert")).to_be_hidden()
        made(page)
        page.close()


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_everything_has_a_name_and_fits(browser: Any, gateway: str, viewport: Any) -> None:
    """By keyboard alone, with a screen reader, at 390 and at 1280 pixels."""
    page = browser.new_page(viewport=viewport)
    page.goto(gateway)
    expect(page.get_by_label("Model")).to_have_value(re.compile("."))
    for name in ("Create", "Compare schedules", "Change an image", "Repaint a part"):
        page.get_by_label(name).check()
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        controls = page.locator("input:visible, select:visible, textarea:visible, button:visible")
        for control in controls.all():
            named = control.evaluate(
                "(e) => [...(e.labels ?? [])].map((l) => l.textContent).join('') || e.textContent"
            )
            assert named.strip(), control.evaluate("(e) => e.outerHTML")
    page.close()
