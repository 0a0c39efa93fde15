"""What pyproject.toml cannot say: a wheel holds the native kernel where torch and a C++ compiler are there to build it.

Elsewhere, as in an environment that pip makes for the build alone, it is a wheel of Python that serves every platform.
TORCH_IVF_NATIVE=0 asks for that one. With SOURCE_DATE_EPOCH in the environment the same files make the same sdist, byte
for byte, as setuptools does for wheels.
"""

import gzip
import importlib.util
import os
import runpy
import sys
import tarfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

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


class Sdist(sdist):
    """With SOURCE_DATE_EPOCH: that time, no owner, and fixed modes for all files, in alphabetical order."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def fixed(entry):
            entry.mtime, entry.mode = int(epoch), 0o755 if entry.mode & 0o100 else 0o644
            entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, "", ""
            return entry

        self.mkpath(os.path.dirname(base_name))
        with (
            open(f"{base_name}.tar.gz", "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch)) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            archive.add(base_dir, filter=fixed)
        return f"{base_name}.tar.gz"


try:
    torch_folder()
    WHY_NOT = None
except compiling["BuildError"] as error:
    WHY_NOT = str(error)

setup(
    ext_modules=[] if WHY_NOT else [Extension("torch_ivf_module.native._kernel", [])],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel, "sdist": Sdist},
)
