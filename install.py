"""What both hosts run when they install Graft; Forge runs it again at every start.

It installs what requirements.txt names and is missing, and nothing else: a package that is there keeps
its version, whoever chose it. Silent when there is nothing to do. What goes wrong is one line with the
remedy, and never a reason for a host not to start.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().with_name("requirements.txt")
HERE = {
    "sys_platform": sys.platform,
    "platform_machine": platform.machine(),
    "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
}


def applies(marker: str, environment: Mapping[str, str] = HERE) -> bool:
    """Whether an environment marker of the form ``name == "value" and python_version < "3.14"`` holds."""
    for name, operator, value in re.findall(r'\b(\w+) (==|<) "([^"]*)"', marker):
        if operator == "==" and environment[name] != value:
            return False
        if operator == "<" and not _version(environment[name]) < _version(value):
            return False
    return True


def _version(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


def missing(requirements: str) -> list[str]:
    """Those requirements, without their markers, that apply here and are not installed in any version."""
    found = []
    for line in requirements.splitlines():
        requirement, _, marker = line.partition("#")[0].partition(";")
        name = re.match(r"[\w.-]*", requirement)
        if name and name[0] and applies(marker) and not _is_installed(name[0]):
            found.append(requirement.strip())
    return found


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def installer() -> list[str]:
    """What installs packages here: pip, or uv in an environment that uv has made, which has no pip."""
    import shutil
    from importlib.util import find_spec

    uv = shutil.which("uv")
    if find_spec("pip") is not None or uv is None:
        return [sys.executable, "-m", "pip", "install", "--no-deps"]
    return [uv, "pip", "install", "--python", sys.executable, "--no-deps"]


def install(requirements: list[str]) -> str | None:
    """Install `requirements` and nothing that they depend on; returns None, or why it did not work."""
    import subprocess  # here, because most runs have nothing to do and should cost nothing

    # what they need (numpy) comes with either host, in the version that the host wants
    command = installer()
    if command[0] == sys.executable:
        command += ["--disable-pip-version-check", "--no-input", "--retries", "0", "--timeout", "10"]
    command += ["--quiet", *requirements]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if ran.returncode == 0:
        return None
    lines = ran.stderr.strip().splitlines()
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")] or lines
    return errors[-1] if errors else f"the installer ended with {ran.returncode}"


def main() -> None:
    wanted = missing(REQUIREMENTS.read_text(encoding="utf-8"))
    if wanted and (reason := install(wanted)):
        names = " ".join(f'"{requirement}"' for requirement in wanted)
        program, *rest = (f'"{part}"' if part == sys.executable else part for part in installer())
        command = " ".join((program, *rest))
        if "No module named pip" in reason:
            command = f"{program} -m ensurepip, then: {command}"
        print(f"Graft: {reason}; to install what is missing, run: {command} {names}")


if __name__ == "__main__":
    main()
