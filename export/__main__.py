"""Checkpoints to a model repository that Triton serves.

`python -m export` exports, verifies and installs a pipeline. `python -m export verify` checks an
installed one against its checkpoints, block by block and over a whole schedule. `python -m export
list` shows what is installed, `python -m export remove NAME` removes a pipeline. A running server
notices none of this until it is started again.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from export import install
from export.deployment import AUTO, ENGINES, PROVIDERS, Deployment
from export.engine import CAPABILITIES
from export.onnx_graph import PRECISIONS
from export.pipeline import Options, export_pipeline, list_pipelines
from export.runtime import candidates
from export.source import Checkpoints
from export.verify import verify_pipeline
from flowturbo.errors import FlowTurboError
from flowturbo.gpu import gpu_count
from flowturbo.nets.weights import WEIGHTS_KEYS
from flowturbo.pipeline import check_name, read_pipeline
from flowturbo.presets import may_be_preset
from flowturbo.runtimes import RUNTIMES
from flowturbo.serving.installation import cache_folder
from flowturbo.settings import Settings
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.schedule import Schedule

DEFAULT_NAME = "sit"  # of a pipeline that is given none


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for what the user can put right."""
    try:
        if argv[:1] == ["verify"]:
            values = vars(_verify_parser().parse_args(argv[1:]))
            pipeline = read_pipeline(values["repository"], values["name"])
            source = _take(Checkpoints, values)
            verify_pipeline(source, values["repository"], pipeline, values["schedule"])
        elif argv[:1] == ["list"]:
            for line in list_pipelines(_list_parser().parse_args(argv[1:]).repository):
                print(line)
        elif argv[:1] == ["remove"]:
            _remove(_remove_parser().parse_args(argv[1:]))
        else:
            export_pipeline(_options(argv))
    except (FlowTurboError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0


def _options(argv: Sequence[str]) -> Options:
    parser = _export_parser()
    values = vars(parser.parse_args(argv))
    if values["compute_capability"] and values["engine"] != "tensorrt":
        parser.error("--compute-capability goes with --engine tensorrt")
    if values["runtime"] == "torch":
        values["provider"] = values["provider"] or ("cuda" if gpu_count() else "cpu")
        if values["provider"] == "tensorrt":
            parser.error("--runtime torch goes with --provider cuda or cpu")
    values["provider"] = values["provider"] or Deployment.provider
    values["precision"] = values["precision"] or (AUTO if values["engine"] == "python" else "fp32")
    chosen = (values["engine"], values["precision"])
    if chosen == ("onnxruntime", "bf16") and values["provider"] != "tensorrt":
        parser.error(
            "ONNX Runtime's own kernels lack bfloat16 (Resize in the decoder): use fp16, "
            "--provider tensorrt or --engine tensorrt; --engine python runs it in OpenVINO on a CPU"
        )
    if values["precision"] == "fp8" and values["engine"] == "onnxruntime":
        parser.error("--precision fp8 goes with --engine tensorrt (or python, slowly, on a CPU)")
    values["source"] = _take(Checkpoints, values)
    if values["ensemble"] is not None:
        values["ensemble"] = tuple(values["ensemble"])
    values["deployment"] = _take(Deployment, values)
    if not candidates(values["deployment"]):
        parser.error(
            f"--engine {values['engine']} does not go with --runtime {values['runtime']} "
            f"--precision {values['precision']}: only --engine python has a choice; there "
            "onnxruntime runs fp32, fp16 and fp8, openvino fp32 and bf16, torch all but fp8"
        )
    values["command"] = shlex.join(["python", "-m", "export", *_for_this_gpu(argv)])
    return _take(Options, values)


def _for_this_gpu(argv: Sequence[str]) -> Iterator[str]:
    """The arguments without --compute-capability, which Triton's engines are not built with."""
    words = iter(argv)
    for word in words:
        if word == "--compute-capability":
            next(words, None)
        elif not word.startswith("--compute-capability="):
            yield word


def _remove(args: argparse.Namespace) -> None:
    gone = install.remove(args.repository, args.name)
    print(f"export: removed {args.name} from {args.repository}: {', '.join(gone)}")
    if Settings.load(args.repository).default_pipeline == args.name:
        print(f"export: default_pipeline still names {args.name}: set it in flowturbo/config.pbtxt")


def _take(cls: Any, values: dict[str, Any]) -> Any:
    """An instance of the dataclass `cls` from those of `values` that are its fields."""
    return cls(**{field.name: values[field.name] for field in fields(cls)})


def _source_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--name", type=_name, default=DEFAULT_NAME, help="of the pipeline (default: %(default)s)")
    add("--predictor", type=Path, required=True, help="SiT checkpoint, .pt or .safetensors")
    add("--refiner", type=Path, help="refiner checkpoint; without it, no R steps")
    add("--vae", type=Path, help="diffusers AutoencoderKL folder; without it, latents only")
    both = "of a .pt that holds both"
    add("--weights", choices=WEIGHTS_KEYS, help=f"the predictor's, {both} (default: ema)")
    add("--refiner-weights", choices=WEIGHTS_KEYS, help=f"the refiner's, {both} (default: model)")
    add("--num-heads", type=_positive, help="attention heads, where the width does not tell")
    add("--refiner-num-heads", type=_positive, help="the refiner's, where they differ")
    add(
        "--num-classes",
        type=_positive,
        help="classes of the predictor, where its file does not state them "
        "(default: the rows of its label table less one, the null class)",
    )
    add(
        "--reverse-time",
        action="store_true",
        help="the predictor has noise at t = 1 and answers noise - data, as REPA's do",
    )
    add("--guidance-channels", type=_positive, default=3, help="channels that guidance acts on")
    add("--repository", type=Path, default=Path("model_repository"))
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export", description=__doc__, parents=[_source_parser()]
    )
    default = Deployment()
    add = parser.add_argument
    add("--class-names", type=Path, help="text file, a class name a line")
    add(
        "--engine",
        choices=ENGINES,
        default=default.engine,
        help="Triton backend: python (ONNX Runtime within it), onnxruntime or tensorrt "
        f"(default: {default.engine})",
    )
    add(
        "--provider",
        choices=PROVIDERS,
        help=f"what --engine onnxruntime runs on (default: {default.provider}), and --runtime "
        "torch (cuda or cpu; default: cuda where a GPU is)",
    )
    add(
        "--precision",
        choices=(AUTO, *PRECISIONS),
        help="of the networks (default: fp32; with --engine python auto, which is the fastest of "
        "fp32 and bf16 on this machine's CPU)",
    )
    add(
        "--runtime",
        choices=(AUTO, *RUNTIMES),
        default=default.runtime,
        help="what runs the networks within --engine python (default: the fastest of onnxruntime "
        "and openvino on this machine's CPU; torch also runs on GPUs)",
    )
    add("--max-rows", type=_pair, default=64, help="most rows in one batch (2 a guided image)")
    add("--opt-rows", type=_positive, default=16, help="rows that an engine is tuned for")
    add(
        "--compute-capability",
        choices=CAPABILITIES,
        help="try --engine tensorrt for a GPU that is not here, with TensorRT for RTX",
    )
    add(
        "--timing-cache",
        type=Path,
        default=cache_folder(),
        help="folder of TensorRT's timing caches",
    )
    add(
        "--ensemble",
        nargs="*",
        metavar="SCHEDULE",
        help="schedules, such as H1P5R3, or presets, that get a model of their own, a Triton "
        "ensemble (default: those that the repository has)",
    )
    add(
        "--presets",
        type=Path,
        metavar="FILE",
        help="schedules that requests may ask for by name, from tuning "
        "(default: those that the repository has, or the paper's)",
    )
    add(
        "--guidance-scale",
        type=_guidance_scale,
        metavar="SCALE",
        help="of requests that give none (default: what the pipeline has, else the setting "
        f"default_guidance_scale, {Settings.default_guidance_scale} in a new repository)",
    )
    add(
        "--default-schedule",
        type=_schedule,
        metavar="SCHEDULE",
        help="of requests that name none, or a preset (default: what the pipeline has, else the "
        "setting default_schedule)",
    )
    add("--force", action="store_true", help="export again although nothing has changed")
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export verify",
        description="Check an installed pipeline against its checkpoints.",
        parents=[_source_parser()],
    )
    parser.add_argument("--schedule", help="of the trajectory (default: H1P5R3, or H1P5)")
    return parser


def _list_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export list", description="Show the pipelines of a repository."
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    return parser


def _remove_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export remove",
        description="Remove a pipeline and its models. A running server serves it until it stops.",
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    return parser


def _name(text: str) -> str:
    try:
        return check_name(text)
    except FlowTurboError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _schedule(text: str) -> str:
    if not may_be_preset(text):
        try:
            Schedule.parse(text)
        except FlowTurboError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not _natural(text):
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return int(text)


def _guidance_scale(text: str) -> float:
    try:
        return Guidance(float(text)).scale
    except (ValueError, FlowTurboError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _pair(text: str) -> int:
    if _natural(text) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, a guided image's rows, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
