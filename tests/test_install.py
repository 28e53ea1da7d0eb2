"""install.py: installs what is missing, touches nothing else, and never stands in the way of a host's start."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import venv
from pathlib import Path

import pip
import pytest
from conftest import ROOT
from graft import install
from packaging.markers import Marker
from packaging.requirements import Requirement
from PIL import Image

INSTALL = ROOT / "install.py"
USER = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("", "#")]
FAKE_PIP = """
import os, sys
open(os.environ["PIP_LOG"], "a").write(repr(sys.argv[1:]) + "\\n")
sys.stderr.write(os.environ.get("PIP_SAYS", ""))
sys.exit(int(os.environ.get("PIP_EXITS", 0)))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The Python of an environment in which nothing is installed, not even pip."""
    folder = tmp_path_factory.mktemp("a host")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def run(python: Path | str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    env |= {"PIP_CONFIG_FILE": os.devnull, **environment} | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([str(python), str(INSTALL)], env=env, capture_output=True, text=True, check=False)


def with_pip(folder: Path) -> Path:
    """A place for PYTHONPATH with a pip that writes down what it is told."""
    (folder / "pip.py").write_text(FAKE_PIP)
    return folder


def test_nothing_to_do_is_silent_and_quick():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = run(sys.executable)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    # processor time, because the machine may be busy with other tests
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_what_is_missing_is_installed_and_nothing_beside_it(bare, tmp_path):
    log = tmp_path / "log"
    ran = run(bare, with_pip(tmp_path), PIP_LOG=str(log))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    (call,) = log.read_text().splitlines()
    wanted = [str(r).split(";")[0] for r in USER if r.marker is None or r.marker.evaluate()]
    assert call.startswith("['install', '--no-deps', ") and call.endswith(", ".join(map(repr, wanted)) + "]")
    assert "upgrade" not in call


@pytest.mark.parametrize("version", ["0.0.1", "99.0"])
def test_an_installed_package_keeps_its_version(bare, tmp_path, version):
    """Also one that requirements.txt would not have chosen: the host may have pinned it."""
    for name in {r.name for r in USER}:
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    log = tmp_path / "log"
    ran = run(bare, with_pip(tmp_path), PIP_LOG=str(log))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert not log.exists()


def test_a_failing_pip_is_one_line_with_the_remedy(bare, tmp_path):
    says = "WARNING: a cache is old\nERROR: No matching distribution found for safetensors\n"
    ran = run(bare, with_pip(tmp_path), PIP_LOG=str(tmp_path / "log"), PIP_SAYS=says, PIP_EXITS="1")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("Graft: No matching distribution found for safetensors; to install what is missing, ")
    assert f'"{bare}" -m pip install --no-deps "safetensors' in ran.stdout and ran.stdout.count("\n") == 1


def without_uv() -> str:
    """The PATH without the folders in which there is one."""
    return os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "uv").exists())


def test_without_pip_it_says_so(bare):
    ran = run(bare, PATH=without_uv())
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "No module named pip" in ran.stdout and ran.stdout.count("\n") == 1
    assert f'run: "{bare}" -m ensurepip, then: "{bare}" -m pip install --no-deps "safetensors' in ran.stdout


@pytest.mark.parametrize("exits", [0, 2])
def test_an_environment_that_uv_made_is_served_by_uv(bare, tmp_path, exits):
    """It has no pip, so that pip's own commands would be no help either."""
    log, uv = tmp_path / "log", tmp_path / "uv"
    uv.write_text(f"#!{sys.executable}\n{FAKE_PIP}")
    uv.chmod(0o755)
    path = os.pathsep.join((str(tmp_path), without_uv()))
    ran = run(bare, PATH=path, PIP_LOG=str(log), PIP_SAYS="error: no network", PIP_EXITS=str(exits))
    assert (ran.returncode, ran.stderr) == (0, "")
    (call,) = log.read_text().splitlines()
    assert call.startswith(f"['pip', 'install', '--python', '{bare}', '--no-deps', '--quiet', 'safetensors")
    told = f'Graft: error: no network; to install what is missing, run: {uv} pip install --python "{bare}" --no-deps "s'
    assert ran.stdout.startswith(told) if exits else not ran.stdout


def test_offline(bare, tmp_path):
    """The real pip, and an index at which nobody answers."""
    (tmp_path / "pip").symlink_to(Path(pip.__file__).parent)
    ran = run(bare, tmp_path, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_NO_CACHE_DIR="1", no_proxy="*")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("Graft: ") and "pip install" in ran.stdout and ran.stdout.count("\n") == 1


@pytest.mark.parametrize("python_version", ["3.10", "3.13", "3.14", "3.9"])
@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "arm64", "aarch64"])
@pytest.mark.parametrize("system", ["linux", "win32", "darwin"])
def test_markers_mean_what_pip_takes_them_for(system, machine, python_version):
    here = {"sys_platform": system, "platform_machine": machine, "python_version": python_version}
    for requirement in USER:
        marker = str(requirement.marker or "")
        assert install.applies(marker, here) == (not marker or Marker(marker).evaluate(dict(here)))


@pytest.mark.parametrize(
    "system, machine, wanted",
    [
        ("linux", "x86_64", 1), ("win32", "AMD64", 1), ("darwin", "arm64", 1),
        ("linux", "aarch64", 0), ("darwin", "x86_64", 0), ("win32", "ARM64", 0),
    ],
)  # fmt: skip
def test_libgguf_is_wanted_where_it_has_wheels(system, machine, wanted):
    here = {"sys_platform": system, "platform_machine": machine}
    lines = [str(r.marker) for r in USER if r.name == "libgguf"]
    assert sum(install.applies(line, here | {"python_version": "3.12"}) for line in lines) == wanted
    assert not any(install.applies(line, here | {"python_version": "3.14"}) for line in lines)


def test_requirements_leave_the_hosts_packages_alone():
    assert {r.name for r in USER} == {"libgguf", "safetensors"}


def test_development_uses_what_users_get():
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line[:1] not in ("", "#")]
    for requirement in USER:
        (pin,) = (p for p in pins if p.name == requirement.name)
        (version,) = (s.version for s in pin.specifier)
        assert requirement.specifier.contains(version)
    assert all(str(p.specifier).startswith("==") for p in pins if p.name != "triton")


def test_what_the_registry_will_read():
    """The lines that wait for a public address name pictures of this repository, as large as the registry takes."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    waiting = re.compile(r"^# (?=\[project\.urls\]|(?:Repository|Icon|Banner) = )", re.MULTILINE)
    said = tomllib.loads(waiting.sub("", text))
    repository, comfy = said["project"]["urls"]["Repository"], said["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"} == set(comfy)
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    icon, banner = (ROOT / comfy[key].removeprefix(raw) for key in ("Icon", "Banner"))
    sides = [float(side) for side in re.search(r'viewBox="0 0 (\S+) (\S+)"', icon.read_text(encoding="utf-8")).groups()]
    assert max(sides) <= 400 and sides[0] == sides[1]
    with Image.open(banner) as picture:
        assert picture.width * 9 == picture.height * 21
