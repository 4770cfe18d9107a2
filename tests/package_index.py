"""A package index in a folder, so that tests run the real pip without a network."""

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from deepen.data.download import Pin


def use_index(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Let pip find packages in `folder` and nowhere else; None is a machine without any index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    if folder is not None:
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def add_wheel(folder: Path, package: str, version: str, members: Mapping[str, bytes]) -> Pin:
    """Put a wheel with these members into the index, and give the pin that fits it."""
    name = f"{package.replace('-', '_')}-{version}"
    files = {
        **members,
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{name}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        archive.writestr(f"{name}.dist-info/RECORD", "".join(f"{member},,\n" for member in files))
    return Pin(package, version, sha256_of(path), megabytes=0.1)


def add_sdist(
    folder: Path, package: str, version: str, setup: str, *, members: Mapping[str, bytes] | None = None
) -> Pin:
    """Put a source distribution with this setup.py and these members into the index, and give the pin that fits it."""
    name = f"{package.replace('-', '_')}-{version}"
    path = folder / f"{name}.tar.gz"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    files = {"setup.py": setup.encode(), "PKG-INFO": metadata.encode(), **(members or {})}
    with tarfile.open(path, "w:gz") as archive:
        for member, content in files.items():
            entry = tarfile.TarInfo(f"{name}/{member}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return Pin(package, version, sha256_of(path), megabytes=0.1, kind="sdist")


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
