"""Compare a wheel and an sdist with the files of this repository: ``python .ci/check_dist.py FOLDER``.

The wheel contains the package and its metadata, and the sdist every tracked file except the settings of CI.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

OF_CI = (".ci/", ".github/", ".pre-commit-config.yaml")
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def compare(what: str, found: set[str], expected: set[str]) -> bool:
    """Print the differences and return whether there are none."""
    for name in sorted(found - expected):
        print(f"{what}: {name} should not be there")
    for name in sorted(expected - found):
        print(f"{what}: {name} is missing")
    return found == expected


def main(folder: Path) -> int:
    """Check the one wheel and the one sdist in a folder."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    tracked = set(subprocess.check_output(["git", "ls-files"], text=True).splitlines())

    name = "-".join(wheel.name.split("-")[:2])
    package = {file for file in tracked if file.startswith("fisherops/")}
    assert "fisherops/py.typed" in package
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    same = compare(wheel.name, in_wheel, package | {f"{name}.dist-info/{file}" for file in METADATA})

    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.removeprefix(f"{name}/") for member in archive if member.isfile()}
    expected = {file for file in tracked if not file.startswith(OF_CI)} | {"PKG-INFO"}
    return not (same & compare(sdist.name, in_sdist, expected))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
