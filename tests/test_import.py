"""Imports in processes of their own: the folder called kernels, entry point, logs, and what importing costs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mikv_compile import versions

ROOT = Path(__file__).parent.parent


def python(code, cwd=ROOT, **env):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_transformers_imports_in_the_repository_root():
    pytest.importorskip("transformers")
    code = "from transformers import LlamaForCausalLM; import kernels; print(kernels.__version__, LlamaForCausalLM)"
    assert python(code).startswith("0 <class")


def test_the_real_package_kernels_is_handed_over(tmp_path):
    pytest.importorskip("transformers")
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from kernels.inner import WHO\n__version__ = '9.9'\n")
    (package / "inner.py").write_text("WHO = 'the real one'\n")
    code = (
        "import kernels; from transformers import LlamaForCausalLM; import mikv_compile.kernels.ops;"
        "print(kernels.WHO, kernels.__version__, mikv_compile.kernels.__name__)"
    )
    assert python(code, PYTHONPATH=str(tmp_path)).strip() == "the real one 9.9 mikv_compile.kernels"


@pytest.mark.parametrize("real", [False, True], ids=["no real package", "a real package"])
def test_two_checkouts_on_the_path(tmp_path, real):
    """Each has a folder called kernels, and neither may take the other one for the real package."""
    twin, site = tmp_path / "twin", tmp_path / "site"
    shutil.copytree(ROOT / "kernels", twin / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    path = [str(twin), str(ROOT)]
    if real:
        (site / "kernels").mkdir(parents=True)
        (site / "kernels" / "__init__.py").write_text("__version__ = '9.9'\n")
        path.append(str(site))
    code = "import kernels, mikv_compile.kernels.ops; print(kernels.__version__, mikv_compile.kernels.__name__)"
    for order in (path, [path[1], path[0], *path[2:]]):
        found = python(code, cwd=tmp_path, PYTHONPATH=os.pathsep.join(order)).strip()
        assert found == f"{'9.9' if real else '0'} mikv_compile.kernels"


def test_backend_is_found_without_an_import(tmp_path):
    code = (
        "import torch; f = torch.compile(lambda x: x + 1, backend='mikv', options={'lower': 'eager'});"
        "print(f(torch.ones(2)).tolist())"
    )
    assert "[2.0, 2.0]" in python(code, cwd=tmp_path)


def test_importing_the_package_imports_neither_torch_nor_anything_slow():
    code = "import sys, mikv_compile; print('torch' in sys.modules, mikv_compile.__version__)"
    assert python(code).startswith("False")


def test_torch_logs(tmp_path):
    code = (
        "import torch; f = torch.compile(lambda x: x + 1, backend='mikv', options={'lower': 'eager'}); f(torch.ones(2))"
    )
    assert "attention calls" in python(code, cwd=tmp_path, TORCH_LOGS="+mikv_compile")


def test_every_public_name_is_there_and_described():
    """Also in the lists for type checkers, which are written twice."""
    import mikv_compile

    text = Path(mikv_compile.__file__).read_text()
    typed = set(re.findall(r"^    from mikv_compile\.\w+ import (.+)$", text, re.MULTILINE))
    typed = {name.strip() for names in typed for name in names.split(",")}
    assert set(mikv_compile.__all__) == set(mikv_compile._PUBLIC) == typed
    for name in mikv_compile.__all__:
        assert getattr(mikv_compile, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mikv_compile.nothing


@pytest.mark.parametrize(
    "version, accepted", [("2.10.1", False), ("1.13", False), ("2.11.0+cu128", True), ("3.0", True)]
)
def test_old_releases_of_torch_are_refused(version, accepted):
    if accepted:
        versions.check_torch(version)
    else:
        with pytest.raises(ImportError, match=r"needs torch 2\.11 or later.*pip install 'torch>=2\.11'"):
            versions.check_torch(version)


def test_an_old_torch_is_named_before_anything_breaks():
    code = "import torch; torch.__version__ = '2.4.0'; import mikv_compile; mikv_compile.compile"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode and "ImportError: mikv_compile needs torch 2.11 or later, and this is torch 2.4.0" in (
        result.stderr
    )


def test_a_newer_torch_is_only_said_to_be_untested():
    assert versions.untested("2.13.0+cpu") is None and versions.untested("2.11") is None
    assert "torch 2.14.0 is newer than 2.13" in versions.untested("2.14.0")
