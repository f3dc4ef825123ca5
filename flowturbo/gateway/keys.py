"""API keys: made once, kept as digests, each with its limits.

`python -m flowturbo.gateway.keys add alice --keys keys.json` prints a new key. The file has only
digests. A running gateway sees changes of the file.
"""

import argparse
import hashlib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from flowturbo.command import positive, run_command
from flowturbo.gateway.answers import Refused

_PREFIX = "sk-flowturbo-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class KeyFileError(ValueError):
    """The file of keys cannot be read or written."""


@dataclass(frozen=True)
class Key:
    """A key by the SHA-256 of its text. `name` is the caller whose share of the time it uses.

    A limit of None is none.
    """

    name: str
    sha256: str
    images_per_minute: int | None = None
    concurrent: int | None = None


class Bucket:
    """At most so many images per minute, all of a minute's at once if they were saved up."""

    def __init__(self, per_minute: int, clock_s: Callable[[], float]) -> None:
        self._most, self._clock_s = per_minute, clock_s
        self._left, self._at = float(per_minute), clock_s()

    def take(self, images: int) -> float:
        """Takes them and returns 0, or returns the seconds to wait."""
        now = self._clock_s()
        self._left = min(self._most, self._left + (now - self._at) * self._most / 60)
        self._at = now
        if images <= self._left:
            self._left -= images
            return 0.0
        return (images - self._left) * 60 / self._most

    def give_back(self, images: int) -> None:
        """Undoes a `take`."""
        self._left = min(self._most, self._left + images)


class Keys:
    """The keys of the file `path`; without one everybody may ask, and there are no limits."""

    def __init__(self, path: Path | None, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock_s = path, clock_s
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, Key] = {}
        self._buckets: dict[str, tuple[int, Bucket]] = {}
        self._running: dict[str, int] = {}
        if path:
            self._refresh()

    def caller(self, authorization: str | None) -> Key | None:
        """The key of an Authorization header; None where no keys are needed. Raises Refused."""
        if self._path is None:
            return None
        self._refresh()
        scheme, _, text = (authorization or "").partition(" ")
        digest = hashlib.sha256(text.strip().encode()).hexdigest()
        found = self._keys.get(digest) if scheme.lower() == "bearer" else None
        if found is None:
            told = "send an API key: Authorization: Bearer sk-..."
            if authorization:
                told = "the API key is unknown"
            raise Refused(401, told, code="invalid_api_key")
        return found

    @contextmanager
    def place(self, key: Key | None) -> Iterator[None]:
        """Holds a place of the key for a request. Raises Refused."""
        if key is None:
            yield
            return
        running = self._running.get(key.name, 0)
        if key.concurrent is not None and running >= key.concurrent:
            raise Refused(
                429,
                f"key {key.name} has {running} requests in flight, at most {key.concurrent} are "
                "allowed",
                code="rate_limit_exceeded",
                retry_after_s=1.0,
            )
        self._running[key.name] = running + 1
        try:
            yield
        finally:
            self._running[key.name] -= 1

    @contextmanager
    def images(self, key: Key | None, count: int) -> Iterator[None]:
        """Counts `count` images against the key's limit; undone if the service refuses them.

        Raises Refused.
        """
        if key is None or key.images_per_minute is None:
            yield
            return
        bucket = self._take(key, key.images_per_minute, count)
        try:
            yield
        except Refused as refused:
            if refused.status in (400, 503):  # nothing was computed
                bucket.give_back(count)
            raise

    def _take(self, key: Key, most: int, images: int) -> Bucket:
        limit = f"key {key.name} may make {most} images per minute"
        if images > most:
            raise Refused(
                400, f"{limit}, this request asks for {images}", param="n", code="invalid_value"
            )
        known = self._buckets.get(key.name)
        if known is None or known[0] != most:
            known = self._buckets[key.name] = most, Bucket(most, self._clock_s)
        if wait_s := known[1].take(images):
            raise Refused(429, limit, code="rate_limit_exceeded", retry_after_s=wait_s)
        return known[1]

    def _refresh(self) -> None:
        """Reads the file if it has changed. A file that cannot be read lets nobody in."""
        assert self._path
        try:
            found = self._path.stat()
            stamp = found.st_mtime_ns, found.st_size
            if stamp == self._stamp:
                return
            self._keys = {key.sha256: key for key in read_keys(self._path)}
            self._stamp = stamp
        except (OSError, KeyFileError):
            if self._stamp is None:
                raise
            self._keys, self._stamp = {}, (0, 0)


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises OSError and KeyFileError."""
    try:
        found = [Key(**each) for each in json.loads(path.read_text(encoding="utf-8"))["keys"]]
        for key in found:
            for limit in (key.images_per_minute, key.concurrent):
                if limit is not None and (type(limit) is not int or limit < 1):
                    raise ValueError(f"limits of {key.name} must be numbers from 1 on: {limit!r}")
        return found
    except (ValueError, TypeError, KeyError) as error:
        raise KeyFileError(f"{path} is no file of keys: {error}") from error


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Replaces the file at once; only its owner can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.new")
    staged.touch(mode=0o600)
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1)
    staged.write_text(text + "\n", encoding="utf-8")
    os.replace(staged, path)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m flowturbo.gateway.keys", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, told in (
        ("add", "make a key and print it"),
        ("remove", "make a key useless"),
        ("list", "show names and limits"),
    ):
        command = commands.add_parser(name, help=told)
        command.add_argument("--keys", type=Path, required=True, metavar="FILE")
        if name != "list":
            command.add_argument("name")
        if name == "add":
            command.add_argument("--images-per-minute", type=positive)
            command.add_argument("--concurrent", type=positive, help="requests in flight")
    args = parser.parse_args(argv)
    return run_command("keys", lambda: _run(args), (KeyFileError, OSError))


def _run(args: argparse.Namespace) -> None:
    known = read_keys(args.keys) if args.keys.exists() else []
    names = [key.name for key in known]
    if args.command == "list":
        for key in known:
            print(f"{key.name}: {key.images_per_minute or 'any number of'} images per minute, "
                  f"{key.concurrent or 'any number of'} requests in flight")  # fmt: skip
        return
    if args.command == "remove":
        if args.name not in names:
            raise KeyFileError(f"no key is named {args.name!r}, known are {', '.join(names)}")
        write_keys(args.keys, [key for key in known if key.name != args.name])
        return
    if not _NAME.fullmatch(args.name) or args.name in names:
        raise KeyFileError(
            "a name has at most 64 letters, digits and ._@-, and no other key has it, got "
            f"{args.name!r}"
        )
    text = _PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(text.encode()).hexdigest()
    made = Key(args.name, digest, args.images_per_minute, args.concurrent)
    write_keys(args.keys, [*known, made])
    print(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
