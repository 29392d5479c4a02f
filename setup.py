"""The parts of packaging that pyproject.toml cannot say: C++ through ninja, and the kernels folder.

Without a C++ compiler or Python's headers the package installs without its kernels and runs on
plain PyTorch; without nvcc, or with FASTDIFF_CUDA=0, without its CUDA kernels, and Triton serves
GPUs.
"""

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import ninja_build
import nvcc


class NinjaBuild(build_ext):
    """Builds each extension with csrc/ninja_build.py."""

    def build_extension(self, extension: Extension) -> None:
        import pybind11

        name = extension.name.rpartition(".")[2]
        folder = Path("build", f"ninja-{sys.implementation.cache_tag}", name)
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        output = Path(self.get_ext_fullpath(extension.name))
        try:
            ninja_build.extension(name, output, folder, includes)
        except Exception as error:
            if not extension.optional:
                raise
            why = "fastdiff: nvcc failed, installing without CUDA kernels; Triton serves GPUs then"
            print(f"{why} ({error})", file=sys.stderr)
            raise CompileError(f"fastdiff.{name}") from error


extensions = []
header = Path(sysconfig.get_path("include"), "Python.h")
if ninja_build.compiler() is None:
    print("fastdiff: no C++ compiler found, installing without kernels", file=sys.stderr)
elif not header.is_file():
    advice = "install Python's headers (Debian: python3-dev), then fastdiff again"
    print(f"fastdiff: no {header}, installing without kernels; {advice}", file=sys.stderr)
else:
    extensions.append(Extension("fastdiff._C", ["csrc/bind.cpp"]))
    if nvcc.compiler():
        extensions.append(Extension("fastdiff._cuda", ["csrc/cuda/bind.cpp"], optional=True))

packages = ["fastdiff.kernels", *(".".join(f.parent.parts) for f in Path("fastdiff").rglob("*.py"))]

setup(
    packages=sorted(set(packages)),
    package_dir={"fastdiff": "fastdiff", "fastdiff.kernels": "kernels"},
    package_data={"fastdiff": ["assets/**", "py.typed"]},
    include_package_data=False,
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
