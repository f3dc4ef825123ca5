"""What is put into a request and read from an answer, and what is refused before sending."""

import base64
import io

import numpy as np
import pytest
from flowturbo_client import FlowTurboClient, InvalidRequestError, ServerError
from PIL import Image


def test_every_argument_reaches_its_tensor(triton):
    noise = np.arange(8, dtype=np.float64).reshape(2, 4, 1, 1)
    with FlowTurboClient(triton.url) as client:
        client.generate(
            ["A", "é"],
            [3, np.int32(4)],
            "H1P5R3",
            1.5,
            pipeline="latents",
            times=[0, 0.25, np.float32(1)],
            guidance_interval=(0.25, 0.75),
            initial_noise=noise,
            output_format="raw",
        )
    inputs = triton.inputs()
    assert inputs.pop("class_name").tolist() == [b"A", "é".encode()]
    assert inputs.pop("seed").tolist() == [3, 4]
    assert inputs.pop("schedule").tolist() == [b"H1P5R3"]
    assert inputs.pop("pipeline").tolist() == [b"latents"]
    times = inputs.pop("times")
    assert times.dtype == np.float32 and times.tolist() == [0.0, 0.25, 1.0]
    assert inputs.pop("guidance_scale").tolist() == [1.5]
    assert inputs.pop("guidance_interval").tolist() == [0.25, 0.75]
    sent = inputs.pop("initial_noise")
    assert sent.dtype == np.float32 and np.array_equal(sent, noise)
    assert inputs.pop("output_format").tolist() == [b"raw"]
    assert not inputs
    assert triton.requests[-1].model_name == "flowturbo"


def test_unset_arguments_are_left_to_the_server(triton):
    with FlowTurboClient(triton.url) as client:
        result = client.generate(1)
    assert set(triton.inputs()) == {"label", "seed"}  # the seed is fixed: see the retries
    assert triton.inputs()["label"].dtype == np.int64
    assert triton.output_names() == ["image", "seed", "settings", "class_name"]
    assert result.seeds.tolist() == triton.inputs()["seed"].tolist()
    assert 0 <= result.seeds[0] < 2**32
    assert result.class_names == ("B",)
    assert result.images.shape == (1, 4, 6, 3)
    assert result.encoded is None and result.latents is None
    assert result.latency_s > 0


@pytest.mark.parametrize(
    ("labels", "tensor", "sent"),
    [
        (np.int64(2), "label", [2]),
        (range(2), "label", [0, 1]),
        (np.array([1, 2], np.uint8), "label", [1, 2]),
        ("B", "class_name", [b"B"]),
        (("A", "B"), "class_name", [b"A", b"B"]),
    ],
)
def test_labels_in_every_form(triton, labels, tensor, sent):
    with FlowTurboClient(triton.url) as client:
        client.generate(labels)
    assert triton.inputs()[tensor].tolist() == sent


def test_a_format_asks_for_files_and_keeps_them(triton):
    with FlowTurboClient(triton.url) as client:
        result = client.generate([0, 1], [7, 8], output_format="png", outputs=("image", "latent"))
    assert triton.output_names() == [*("encoded_image", "latent", "seed", "settings", "class_name")]
    assert result.images is None
    assert [data[:4] for data in result.encoded] == [b"\x89PNG"] * 2
    assert result.latents.shape == (2, 2, 1, 1)
    assert [image.getpixel((0, 0)) for image in result.pil()] == [(7, 7, 7), (8, 8, 8)]


def test_the_answer_says_what_was_used(triton):
    """Defaults that the server filled in, and what the request itself asked for."""
    with FlowTurboClient(triton.url) as client:
        by_default = client.generate(0).settings
        asked = client.generate(
            0, None, "H2", 2.0, pipeline="latents", times=(0, 0.5, 1), output_format="png"
        ).settings
    assert by_default["pipeline"] == "glyphs" and by_default["schedule"] == "H1P5R3"
    assert by_default["guidance_scale"] == 3.0 and by_default["times"] is None
    assert asked == {
        "pipeline": "latents",
        "schedule": "H2",
        "times": [0.0, 0.5, 1.0],
        "guidance_scale": 2.0,
        "guidance_interval": [0.0, 1.0],
        "size": [4, 6],
        "variant": "reference",
        "output_format": "png",
    }


def test_pipelines_need_no_input(triton):
    with FlowTurboClient(triton.url) as client:
        found = client.pipelines(timeout_s=3)
    assert found == triton.pipelines
    assert triton.inputs() == {} and triton.output_names() == ["pipelines"]
    assert 0 < triton.requests[-1].parameters["timeout"].int64_param <= 3_000_000


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (None, "'pipelines' is missing"),
        (np.array([b"{"], object), "cannot be read"),
        (np.array([b"\xff"], object), "utf-8"),
        (np.array([b"{}"], object), "must be a list"),
        (np.array([b"[]", b"[]"], object), r"\[1\], got object \[2\]"),
        (np.zeros(1, np.float32), "float32"),
    ],
)
def test_a_broken_list_of_pipelines(triton, broken, message):
    triton.script = [{"pipelines": broken}]
    with FlowTurboClient(triton.url) as client:
        with pytest.raises(ServerError, match=message):
            client.pipelines()


def test_files_as_text(triton):
    """Base64 text is kept as the server sent it, and shown as the image it is."""
    png = io.BytesIO()
    Image.new("RGB", (2, 2), (1, 2, 3)).save(png, "PNG")
    text = base64.b64encode(png.getvalue())
    triton.script = [{"encoded_image": np.array([text], dtype=object)}]
    with FlowTurboClient(triton.url) as client:
        result = client.generate(0, 1, output_format="png_base64")
    assert result.encoded == (text,)
    assert result.pil()[0].getpixel((1, 1)) == (1, 2, 3)


def test_pil_of_raw_images_and_of_none(triton):
    with FlowTurboClient(triton.url) as client:
        (image,) = client.generate(0, 9).pil()
        assert image.size == (6, 4) and image.getpixel((5, 3)) == (9, 9, 9)
        with pytest.raises(InvalidRequestError, match="no images"):
            client.generate(0, outputs=("latent",)).pil()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, "at least one image"),
        ({"labels": [1, "A"]}, "int, str"),
        ({"labels": True}, "True"),
        ({"labels": [1.0]}, "float"),
        ({"labels": b"AB"}, "b'AB'"),
        ({"labels": {"A"}}, "sequence"),
        ({"labels": np.zeros((2, 2), int)}, r"shape \(2, 2\)"),
        ({"labels": 2**63}, "9223372036854775808"),
        ({"labels": "\udc80"}, "not valid text"),
        ({"labels": [0, 1], "seeds": [1]}, "2 images, 1 seeds"),
        ({"labels": 0, "seeds": -1}, "-1"),
        ({"labels": 0, "seeds": 2**63}, "9223372036854775808"),
        ({"labels": 0, "seeds": [0.5]}, "0.5"),
        ({"labels": 0, "schedule": 8}, "schedule must be a string"),
        ({"labels": 0, "guidance_scale": "2"}, "guidance_scale must be a number, got '2'"),
        ({"labels": 0, "pipeline": 1}, "pipeline must be a string, got 1"),
        ({"labels": 0, "pipeline": "\udc80"}, "pipeline is not valid text"),
        ({"labels": 0, "times": 0.5}, "times must be a sequence of numbers, got 0.5"),
        ({"labels": 0, "times": [0, "1"]}, "times must be a number, got '1'"),
        ({"labels": 0, "guidance_interval": (0.1,)}, "two numbers"),
        ({"labels": 0, "initial_noise": np.zeros((2, 4, 1, 1))}, r"\[1, C, h, w\], got \[2, 4"),
        ({"labels": 0, "initial_noise": [[1.0]]}, "numpy float array, got list"),
        ({"labels": 0, "outputs": ("pixels",)}, "pixels"),
        ({"labels": 0, "outputs": ()}, "outputs"),
        ({"labels": 0, "timeout_s": 0}, "timeout_s"),
        ({"labels": 0, "timeout_s": float("nan")}, "nan"),
    ],
)
def test_what_cannot_be_right_is_not_sent(triton, arguments, message):
    with FlowTurboClient(triton.url) as client:
        with pytest.raises(InvalidRequestError, match=message) as caught:
            client.generate(**arguments)
    assert isinstance(caught.value, ValueError)
    assert not triton.requests


@pytest.mark.parametrize(
    "settings",
    [
        {"url": ""},
        {"url": "http://localhost:8001"},
        {"url": "grpc://a:1"},
        {"url": "HTTP://a"},
        {"model": ""},
        {"retries": -1},
    ]
    + [{"timeout_s": float("inf")}],
)
def test_settings_are_checked(settings):
    with pytest.raises(InvalidRequestError):
        FlowTurboClient(**settings)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"image": None}, "'image' is missing"),
        ({"image": np.zeros((1, 4, 6), np.uint8)}, r"\[1, 4, 6\]"),
        ({"image": np.zeros((1, 4, 6, 3), np.float32)}, "float32"),
        ({"seed": np.zeros(2, np.int64)}, "'seed'"),
        ({"class_name": np.array([b"\xff"], object)}, "utf-8"),
        ({"settings": None}, "'settings' is missing"),
        ({"settings": np.array([b"{"], object)}, "cannot be read"),
        ({"settings": np.array([b"[]"], object)}, "must be an object"),
        ({"settings": np.array([b"{}", b"{}"], object)}, r"'settings' must be object \[1\]"),
    ],
)
def test_an_answer_that_breaks_the_contract(triton, broken, message):
    triton.script = [broken]
    with FlowTurboClient(triton.url) as client:
        with pytest.raises(ServerError, match=message):
            client.generate(0)
    assert len(triton.requests) == 1
