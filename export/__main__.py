"""Exports checkpoints to a model repository that Triton serves.

`python -m export` exports, verifies and installs a pipeline. `python -m export verify` compares an
installed pipeline with its checkpoints, per block and over a whole schedule. `python -m export
list` shows the installed pipelines. `python -m export remove NAME` removes a pipeline. A running
server notices changes only after a restart.
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
from export.folder_source import FolderSource
from export.onnx_graph import PRECISIONS
from export.pipeline import Options, export_pipeline, list_pipelines
from export.runtime import candidates
from export.source import Checkpoints, Source
from export.verify import verify_pipeline
from flowturbo.command import image_size, natural, positive, run_command
from flowturbo.errors import FlowTurboError
from flowturbo.gpu import gpu_count
from flowturbo.nets.families.family import FolderOptions
from flowturbo.nets.weights import WEIGHTS_KEYS
from flowturbo.pipeline import check_name, read_pipeline
from flowturbo.presets import may_be_preset
from flowturbo.runtimes import RUNTIMES
from flowturbo.serving.installation import cache_folder
from flowturbo.settings import Settings
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.schedule import Schedule

DEFAULT_NAME = "sit"  # name of a pipeline without --name


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, with one line on stderr, for errors that the user can fix."""
    return run_command("export", lambda: _run(argv), (FlowTurboError, OSError))


def _run(argv: Sequence[str]) -> None:
    action, rest = argv[:1], argv[1:]
    if action == ["verify"]:
        parser = _verify_parser()
        values = vars(parser.parse_args(rest))
        pipeline = read_pipeline(values["repository"], values["name"])
        source = _source(parser, values)
        verify_pipeline(source, values["repository"], pipeline, values["schedule"])
    elif action == ["list"]:
        for line in list_pipelines(_list_parser().parse_args(rest).repository):
            print(line)
    elif action == ["remove"]:
        _remove(_remove_parser().parse_args(rest))
    else:
        export_pipeline(_options(argv))


def _options(argv: Sequence[str]) -> Options:
    parser = _export_parser()
    values = vars(parser.parse_args(argv))
    if values["compute_capability"] and values["engine"] != "tensorrt":
        parser.error("--compute-capability needs --engine tensorrt")
    if values["runtime"] == "torch":
        values["provider"] = values["provider"] or ("cuda" if gpu_count() else "cpu")
        if values["provider"] == "tensorrt":
            parser.error("--runtime torch needs --provider cuda or cpu")
    values["provider"] = values["provider"] or Deployment.provider
    values["precision"] = values["precision"] or (AUTO if values["engine"] == "python" else "fp32")
    chosen = (values["engine"], values["precision"])
    if chosen == ("onnxruntime", "bf16") and values["provider"] != "tensorrt":
        parser.error(
            "ONNX Runtime's own kernels lack bfloat16 (Resize in the decoder): use fp16, "
            "--provider tensorrt or --engine tensorrt; --engine python runs it in OpenVINO on a CPU"
        )
    if values["precision"] == "fp8" and values["engine"] == "onnxruntime":
        parser.error("--precision fp8 needs --engine tensorrt (or python, slow on a CPU)")
    values["source"] = _source(parser, values)
    if values["ensemble"] is not None:
        values["ensemble"] = tuple(values["ensemble"])
    if values["diffusers"] and values["ensemble"]:
        parser.error("--ensemble is for pipelines with classes: a prompt needs its text encoder")
    values["deployment"] = _take(Deployment, values)
    if not candidates(values["deployment"]):
        parser.error(
            f"--engine {values['engine']} cannot run --runtime {values['runtime']} "
            f"--precision {values['precision']}: runtimes are for --engine python, where "
            "onnxruntime runs fp32, fp16 and fp8, openvino fp32 and bf16, torch all but fp8"
        )
    values["command"] = shlex.join(["python", "-m", "export", *_for_this_gpu(argv)])
    return _take(Options, values)


def _for_this_gpu(argv: Sequence[str]) -> Iterator[str]:
    """The arguments without --compute-capability: engines for Triton are built without it."""
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
    """An instance of the dataclass `cls`; takes its fields from `values`."""
    return cls(**{field.name: values[field.name] for field in fields(cls)})


# Options of one kind of source alone.
_FOR_CHECKPOINTS = (
    *("vae", "weights", "refiner_weights", "num_heads", "refiner_num_heads"),
    *("num_classes", "reverse_time"),
)
_FOR_FOLDERS = ("network_file", "without_t5", "text_length", "size", "distilled", "rectified_flow")


def _source(parser: argparse.ArgumentParser, values: dict[str, Any]) -> Source:
    """Where the networks come from: checkpoints of a SiT, or a diffusers folder."""
    if (values["predictor"] is None) == (values["diffusers"] is None):
        parser.error("give either --predictor (a SiT checkpoint) or --diffusers (a folder)")
    given = "predictor" if values["predictor"] else "diffusers"
    for name in _FOR_FOLDERS if given == "predictor" else _FOR_CHECKPOINTS:
        if values[name] not in (None, False, []):
            parser.error(f"--{name.replace('_', '-')} does not go with --{given}")
    if given == "predictor":
        return Checkpoints(**{f.name: values[f.name] for f in fields(Checkpoints)})
    sizes = tuple(dict.fromkeys(values["size"] or ()))
    options = {f.name: values[f.name] for f in fields(FolderOptions) if f.name != "path"}
    return FolderSource(FolderOptions(values["diffusers"], **options), sizes)


def _source_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--name", type=_name, default=DEFAULT_NAME, help="pipeline name (default: %(default)s)")
    add("--predictor", type=Path, help="SiT checkpoint, .pt or .safetensors")
    add("--diffusers", type=Path, metavar="FOLDER", help="text-to-image pipeline of diffusers")
    add("--refiner", type=Path, help="refiner checkpoint or folder; without it, no R steps")
    add(
        "--network-file",
        type=Path,
        metavar="FILE",
        help="single-file checkpoint (safetensors) in place of the folder's transformer or U-Net",
    )
    add("--without-t5", action="store_true", help="leave out SD3's third text encoder (T5)")
    add(
        "--text-length",
        type=natural,
        help="tokens of a text: of T5 in SD3 (default: 256), of Qwen3 (default: 512)",
    )
    add(
        "--size",
        type=image_size,
        nargs="+",
        metavar="WIDTHxHEIGHT",
        help="image sizes in pixels, first the default (default: the model's)",
    )
    add("--distilled", action="store_true", help="a step-distilled model: takes E steps only")
    add(
        "--rectified-flow",
        action="store_true",
        help="the folder's U-Net predicts a velocity, as InstaFlow's do",
    )
    add("--vae", type=Path, help="diffusers AutoencoderKL folder; without it, latents only")
    both = "weights to read from a .pt that holds both"
    add("--weights", choices=WEIGHTS_KEYS, help=f"predictor {both} (default: ema)")
    add("--refiner-weights", choices=WEIGHTS_KEYS, help=f"refiner {both} (default: model)")
    add("--num-heads", type=positive, help="attention heads; needed for an unusual width")
    add("--refiner-num-heads", type=positive, help="attention heads of the refiner, if different")
    add(
        "--num-classes",
        type=positive,
        help="classes of the predictor, if its file does not state them "
        "(default: the rows of its label table minus one, the null class)",
    )
    add(
        "--reverse-time",
        action="store_true",
        help="the predictor has noise at t = 1 and predicts noise - data, as REPA's models do",
    )
    add("--guidance-channels", type=positive, default=3, help="channels that guidance acts on")
    add("--repository", type=Path, default=Path("model_repository"))
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export", description=__doc__, parents=[_source_parser()]
    )
    default = Deployment()
    add = parser.add_argument
    add("--class-names", type=Path, help="text file, one class name per line")
    add(
        "--engine",
        choices=ENGINES,
        default=default.engine,
        help="Triton backend: python (ONNX Runtime, OpenVINO or PyTorch within it, see --runtime), "
        f"onnxruntime or tensorrt (default: {default.engine})",
    )
    add(
        "--provider",
        choices=PROVIDERS,
        help=f"device of --engine onnxruntime (default: {default.provider}) and of --runtime "
        "torch (cuda or cpu; default: cuda if there is a GPU)",
    )
    add(
        "--precision",
        choices=(AUTO, *PRECISIONS),
        help="precision of the networks (default: fp32; with --engine python auto: the faster of "
        "fp32 and bf16 on this machine's CPU)",
    )
    add(
        "--runtime",
        choices=(AUTO, *RUNTIMES),
        default=default.runtime,
        help="what runs the networks within --engine python (default: the faster of onnxruntime "
        "and openvino on this machine's CPU; torch also runs on GPUs)",
    )
    add("--max-rows", type=_pair, default=64, help="largest batch in rows (2 per guided image)")
    add("--opt-rows", type=positive, default=16, help="batch size that engines are tuned for")
    add(
        "--compute-capability",
        choices=CAPABILITIES,
        help="try --engine tensorrt for a GPU that is not in this machine, with TensorRT for RTX",
    )
    add(
        "--timing-cache",
        type=Path,
        default=cache_folder(),
        help="folder for TensorRT's timing caches",
    )
    add(
        "--ensemble",
        nargs="*",
        metavar="SCHEDULE",
        help="schedules, such as H1P5R3, or presets to install as Triton ensembles "
        "(default: those that the pipeline has)",
    )
    add(
        "--presets",
        type=Path,
        metavar="FILE",
        help="file of presets (names for schedules), as tuning writes it "
        "(default: those that the pipeline has, else the paper's)",
    )
    add(
        "--solvers",
        type=Path,
        metavar="FILE",
        help="solvers that were fitted to this model, as tuning.fit writes them "
        "(default: those that the pipeline has)",
    )
    add(
        "--guidance-scale",
        type=_guidance_scale,
        metavar="SCALE",
        help="default guidance scale of requests (default: what the pipeline has, else the setting "
        f"default_guidance_scale, {Settings.default_guidance_scale} in a new repository)",
    )
    add(
        "--default-schedule",
        type=_schedule,
        metavar="SCHEDULE",
        help="default schedule of requests, or a preset (default: what the pipeline has, else the "
        "setting default_schedule)",
    )
    add("--force", action="store_true", help="export again even if nothing has changed")
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export verify",
        description="Check an installed pipeline against its checkpoints.",
        parents=[_source_parser()],
    )
    parser.add_argument(
        "--schedule", help="schedule of the trajectory (default: H1P5R3; H1P5 without a refiner)"
    )
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


def _guidance_scale(text: str) -> float:
    try:
        return Guidance(float(text)).scale
    except (ValueError, FlowTurboError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _pair(text: str) -> int:
    if natural(text) < 2:
        raise argparse.ArgumentTypeError(
            f"must be at least 2 (the rows of one guided image), got {text}"
        )
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
