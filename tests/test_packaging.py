"""The sdist; of it alone, in a fresh environment: pip install ., pip install -e . and a wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path, PurePath

import pytest

import fastdiff

ROOT = Path(__file__).parents[1]
UNSHIPPED = {".ci/run", ".gitignore"}
JUNK = ["bench/results/a.json", "build/a.o", "dist/a.whl", "fastdiff/_C.so", "runs/a.png", "a.png"]
JUNK += ["docs/results/a.unfinished/a.safetensors"]
JUNK += ["fastdiff/__pycache__/a.pyc", "kernels/__pycache__/a.pyc", ".venv/a.py", ".hypothesis/a"]

USE = """
import torch, fastdiff, fastdiff.kernels, fastdiff.models, fastdiff.op, sys
from importlib.metadata import version
from pathlib import Path
assert fastdiff.__version__ == version("fastdiff")
here = Path(fastdiff.__file__).parent
streams = fastdiff.ops.streams_of(0, 1)
with fastdiff.backend("reference"):
    expected = fastdiff.ops.randn((1, 8))
assert torch.allclose(fastdiff.ops.randn((1, 8)), expected, atol=1e-6)
assert sorted(p.name for p in (here / "assets").rglob("*") if p.is_file()) == sys.argv[1].split()
print(here, fastdiff.op.missing("cpp") is None)
"""


@pytest.fixture(scope="module")
def sources():
    """The files of the project, as git has them."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    return {name for name in listed.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory):
    """The sdist of a checkout that has been worked in."""
    root = tmp_path_factory.mktemp("checkout")
    for name in [*sources, *JUNK]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name in JUNK:
            (root / name).touch()
        else:
            shutil.copy(ROOT / name, root / name)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", root, cwd=root)
    (made,) = root.glob("dist/*.tar.gz")
    return made


@pytest.fixture(scope="module")
def tree(sdist, tmp_path_factory):
    """The sdist, unpacked; its build folder is shared, so that C++ compiles once."""
    folder = tmp_path_factory.mktemp("tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"fastdiff-{fastdiff.__version__}"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The python of a fresh environment that has our dependencies, but not our own install."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    # a path named in a .pth file is searched, its own .pth files (our editable install) are not
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def run(*command, cwd, **environment):
    """What it says. CUDA is left out, which nvcc takes most of a minute for, unless asked for."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"FASTDIFF_CUDA": "0"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def pip(python, *arguments, cwd, **environment):
    command = (python, "-m", "pip", "install", "--no-deps", "--quiet", "--force-reinstall")
    return run(*command, "--disable-pip-version-check", *arguments, cwd=cwd, **environment)


def use(python, cwd, tree):
    """Where the installed package is, and whether it has its C++ kernels; it must work."""
    assets = sorted(p.name for p in (tree / "fastdiff/assets").rglob("*") if p.is_file())
    where, has_kernels = run(python, "-c", USE, " ".join(assets), cwd=cwd).split()
    return Path(where), has_kernels == "True"


def test_sdist_is_what_git_has(sdist, sources):
    with tarfile.open(sdist) as archive:
        names = [PurePath(*PurePath(m.name).parts[1:]) for m in archive.getmembers() if m.isfile()]
    packed = {n.as_posix() for n in names if n.parts[0] != "fastdiff.egg-info"}
    assert packed - {"PKG-INFO", "setup.cfg"} == sources - UNSHIPPED


def test_the_changelog_begins_with_this_version(sdist):
    newest = re.search(r"^## (\d+\.\d+\.\d+)\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == fastdiff.__version__
    assert sdist.name == f"fastdiff-{newest[1]}.tar.gz"


def test_pip_install_in_isolation(tree, fresh, tmp_path):
    pip(fresh, tree, cwd=tmp_path)
    where, has_kernels = use(fresh, tmp_path, tree)
    assert where.is_relative_to(fresh.parents[1]) and has_kernels
    command = fresh.parent / "fastdiff"
    assert "no C++ kernels" not in run(command, "doctor", cwd=tmp_path)


def test_wheel(tree, fresh, tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, tree, cwd=tree)
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" not in wheel.name
    pip(fresh, wheel, cwd=tmp_path)
    where, has_kernels = use(fresh, tmp_path, tree)
    assert where.is_relative_to(fresh.parents[1]) and has_kernels
    command = fresh.parent / "fastdiff"
    run(command, "doctor", cwd=tmp_path)
    run(command, "sample", "--num", "2", "--steps", "2", "--out", "x.png", cwd=tmp_path)
    assert (tmp_path / "x.png").is_file()


def test_editable_install_is_live(tree, fresh, tmp_path):
    pip(fresh, "-e", tree, cwd=tmp_path)
    where, has_kernels = use(fresh, tmp_path, tree)
    assert where == tree / "fastdiff" and has_kernels
    for module, file in {"fastdiff.ops": "fastdiff/ops", "fastdiff.kernels": "kernels"}.items():
        with (tree / file / "__init__.py").open("a") as f:
            f.write("\nLIVE = 7\n")
        assert run(fresh, "-c", f"import {module} as m; print(m.LIVE)", cwd=tmp_path) == "7\n"


def test_without_a_compiler_the_package_installs_and_runs(tree, fresh, tmp_path):
    shutil.rmtree(tree / "fastdiff.egg-info", ignore_errors=True)
    for built in (tree / "fastdiff").glob("*.so"):
        built.unlink()
    command = (fresh, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, tree)
    told = run(*command, cwd=tmp_path, PATH="/nowhere", CXX="")
    assert "no C++ compiler" in told
    (wheel,) = tmp_path.glob("*.whl")
    pip(fresh, wheel, cwd=tmp_path)
    where, has_kernels = use(fresh, tmp_path, tree)
    assert where.is_relative_to(fresh.parents[1]) and not has_kernels


def test_a_broken_nvcc_is_done_without(tree, fresh, tmp_path):
    fake = tmp_path / "bin" / "nvcc"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho its toolkit is gone >&2\nexit 1\n")
    fake.chmod(0o755)
    path = os.pathsep.join([str(fake.parent), os.environ["PATH"]])
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, tree)
    told = run(*command, cwd=tree, PATH=path, FASTDIFF_CUDA="1")
    assert told.count("fastdiff: nvcc failed, installing without CUDA kernels") == 1
    assert "its toolkit is gone" in told
    (wheel,) = tmp_path.glob("*.whl")
    pip(fresh, wheel, cwd=tmp_path)
    where, has_kernels = use(fresh, tmp_path, tree)
    assert where.is_relative_to(fresh.parents[1]) and has_kernels
    ask = "from fastdiff.op import missing; print(missing('cuda'))"
    assert "fastdiff._cuda is not built" in run(fresh, "-c", ask, cwd=tmp_path)
