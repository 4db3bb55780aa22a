"""What gets installed: the wheel and the sdist, what they hold, and that they work away from the repository."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, cwd, **env):
    found = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist, built from a copy of what git does not ignore."""
    if find_spec("build") is None or find_spec("setuptools") is None:
        pytest.skip("needs the packages build and setuptools: pip install -e '.[dev]'")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    if not (ROOT / ".git").exists():
        pytest.skip("builds what git does not ignore, and this is no checkout")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file() and not name.startswith("benchmarks/results"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source)
    return out


def names_in(built, pattern):
    (file,) = built.glob(pattern)
    if file.suffix == ".whl":
        return set(zipfile.ZipFile(file).namelist())
    return {name.partition("/")[2] for name in tarfile.open(file).getnames()}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = names_in(built, "*.whl")
    folders = {name.partition("/")[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"mikv_compile"}
    wanted = {"py.typed", "plans/smollm2-135m.json", "eval/suites/quick.toml", "kernels/attention.cpp"}
    for folder, prefix in ((ROOT / "mikv_compile", ""), (ROOT / "passes", "passes/"), (ROOT / "kernels", "kernels/")):
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        # The two folders may be links inside the package in a working copy.
        files = [name for name in files if prefix or not name.startswith(("passes/", "kernels/"))]
        wanted |= {prefix + name for name in files if name.endswith((".py", ".cpp", ".h"))}
    assert {f"mikv_compile/{name}" for name in wanted} <= names


def test_the_sdist_can_be_built_from(built):
    names = names_in(built, "*.tar.gz")
    assert {"pyproject.toml", "README.md", "LICENSE", "passes/pair.py", "kernels/attention.cpp"} <= names


def test_the_installed_wheel_works_in_a_folder_of_its_own(built, tmp_path):
    """In an environment that sees this one's other packages, but not the repository."""
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    python = next(p for p in (place / "bin" / "python", place / "Scripts" / "python.exe") if p.exists())
    (packages,) = (
        Path(p) for p in run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).split()
    )
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", packages, wheel, cwd=tmp_path)
    # Behind the wheel's own files, so that these are the ones that are found.
    (packages / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    code = (
        "import torch, mikv_compile, pathlib; print(pathlib.Path(mikv_compile.__file__).parent.parent);"
        "f = torch.compile(lambda x: x + 1, backend='mikv', options={'lower': 'eager'});"
        "print(f(torch.ones(2)).tolist(), 'mikv' in torch._dynamo.list_backends(exclude_tags=None))"
    )
    found, result = run(python, "-c", code, cwd=tmp_path, PYTHONPATH="").splitlines()[-2:]
    assert Path(found).resolve() == packages.resolve() and result == "[2.0, 2.0] True"
    told = run(python, "-c", "from mikv_compile.cli import main; main()", "--help", cwd=tmp_path, PYTHONPATH="")
    assert "sweep" in told
