"""What pyproject.toml cannot say: a wheel holds the native kernel where torch and a C++ compiler are there to build it.

Elsewhere, as in an environment that pip makes for the build alone, it is a wheel of Python that serves every platform.
TORCH_IVF_NATIVE=0 asks for that one.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("torch_ivf_module", "native")
compiling = runpy.run_path(str(Path(__file__).parent / NATIVE / "compiling.py"))


def torch_folder() -> Path:
    """Of the package torch, which is not imported. Raises BuildError where the kernel cannot be built."""
    found = importlib.util.find_spec("torch")
    if os.environ.get("TORCH_IVF_NATIVE") == "0":
        raise compiling["BuildError"]("TORCH_IVF_NATIVE=0")
    if found is None or not found.origin:
        raise compiling["BuildError"]("no torch is here; pip install --no-build-isolation takes the installed one")
    folder = Path(found.origin).parent
    compiling["require_tools"](folder)
    return folder


class BuildKernel(build_ext):
    """Compiles the library for all versions of Python: it knows of torch alone."""

    def finalize_options(self):
        super().finalize_options()
        if self.editable_mode:  # the source may change: there build-native compiles it
            self.extensions = []

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext):
        compiling["compile_kernel"](Path(self.get_ext_fullpath(ext.name)), torch_folder())


class Wheel(bdist_wheel):
    """A wheel for every Python 3, and with the kernel for one platform."""

    def run(self):
        if self.root_is_pure:
            print(f"a wheel without the native kernel: {WHY_NOT}", file=sys.stderr)
        super().run()

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


try:
    torch_folder()
    WHY_NOT = None
except compiling["BuildError"] as error:
    WHY_NOT = str(error)

setup(
    ext_modules=[] if WHY_NOT else [Extension("torch_ivf_module.native._kernel", [])],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel},
)
