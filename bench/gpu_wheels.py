"""Downloads wheels for a GPU machine without a network: `python -m bench.gpu_wheels FOLDER`.

bench.gpu_check, gpu_profile and gpu_serve_check need these wheels. The GPU machine must have
a CUDA build of PyTorch, onnx, matplotlib and scipy. The versions are those of constraints.txt. Only
the stub for that machine's Python stays in nvidia-pytriton. The wheels go into numbered folders of
at most `--part-mb` MB, because some transfers to such a machine are limited in size.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGES = (
    *("diffusers", "transformers", "tokenizers", "huggingface_hub", "httpx2", "httpcore2"),
    *("truststore", "lazy-importer"),
    *("importlib_metadata", "zipp", "safetensors", "regex", "filelock", "pillow", "requests"),
    *("certifi", "charset-normalizer", "idna", "tqdm", "PyYAML", "packaging", "anyio", "h11"),
    *("tritonclient", "python-rapidjson", "grpcio", "protobuf", "urllib3"),
    *("numpy", "scipy", "nvidia-pytriton"),
)
_GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # manylinux_2_N: pip matches each N alone
_STUBS = "pytriton/tritonserver/python_backend_stubs/"


def main() -> None:
    """Downloads the wheels, shrinks the server's wheel, and sorts all wheels into parts."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_wheels", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the GPU machine (default: 3.12)")
    parser.add_argument("--part-mb", type=float, default=43)
    args = parser.parse_args()
    if args.folder.exists():
        raise SystemExit(f"{args.folder} exists already: name a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        download(Path(scratch), args.python)
        for wheel in Path(scratch).glob("nvidia_pytriton-*.whl"):
            slim_server(wheel, args.python)
        wheels = sorted(Path(scratch).glob("*.whl"), key=lambda path: path.stat().st_size)
        for k, part in enumerate(parts(wheels, args.part_mb), start=1):
            target = args.folder / str(k)
            target.mkdir(parents=True)
            for wheel in part:
                (target / wheel.name).write_bytes(wheel.read_bytes())
            size = sum(wheel.stat().st_size for wheel in part) / 1e6
            print(f"{target}: {size:.1f} MB: {', '.join(sorted(wheel.name for wheel in part))}")
    # Not --target: the server's models find only PyTorch's own environment.
    print("On the GPU machine, install each part beside PyTorch:")
    print("python3 -m pip install --no-index --no-deps PART/*")
    print("Then: export PYTHONPATH=client")


def download(folder: Path, python: str) -> None:
    """Downloads all wheels for Linux on x86-64; raises SystemExit after pip's own message."""
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in _GLIBC]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    command += [*platforms, "--platform=manylinux2014_x86_64", "-c", "constraints.txt"]
    done = subprocess.run([*command, "-d", str(folder), *PACKAGES], cwd=_root())
    if done.returncode:
        raise SystemExit(done.returncode)


def _root() -> Path:
    return Path(__file__).resolve().parents[1]


def slim_server(wheel: Path, python: str) -> None:
    """Removes the stubs of other Python versions, and the Python library that only they need.

    Raises SystemExit if the wheel has no stub for `python`.
    """
    with zipfile.ZipFile(wheel) as given:
        names = given.namelist()
        if not any(name.startswith(f"{_STUBS}{python}/") for name in names):
            raise SystemExit(f"{wheel.name} has no stub for Python {python}")
        kept = [name for name in names if _is_needed(name, python)]
        with zipfile.ZipFile(wheel.with_suffix(".new"), "w", zipfile.ZIP_DEFLATED) as made:
            for name in kept:
                content = given.read(name)
                if name.endswith(".dist-info/RECORD"):
                    rows = content.decode().splitlines(keepends=True)
                    content = "".join(r for r in rows if r.split(",")[0] in kept).encode()
                made.writestr(given.getinfo(name), content)  # keeps the permissions
    wheel.with_suffix(".new").replace(wheel)


def _is_needed(name: str, python: str) -> bool:
    if name.startswith(_STUBS):
        return name.startswith(f"{_STUBS}{python}/")
    # The wheel has the library of its newest Python only.
    is_library = "libs/libpython3" in name
    return not is_library or name.endswith(f".{python.partition('.')[2]}.so.1.0")


def parts(wheels: Sequence[Path], most_mb: float) -> list[list[Path]]:
    """`wheels` in parts of at most `most_mb` MB; raises SystemExit for a larger wheel."""
    made: list[tuple[float, list[Path]]] = []
    for wheel in sorted(wheels, key=lambda path: -path.stat().st_size):
        size = wheel.stat().st_size / 1e6
        if size > most_mb:
            raise SystemExit(f"{wheel.name} has {size:.1f} MB, more than --part-mb {most_mb:g}")
        for k, (total, part) in enumerate(made):
            if total + size <= most_mb:
                made[k] = (total + size, [*part, wheel])
                break
        else:
            made.append((size, [wheel]))
    return [part for _, part in made]


if __name__ == "__main__":
    main()
