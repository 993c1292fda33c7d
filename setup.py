"""The build of the native kernels; everything else about the package is in pyproject.toml.

The kernels are one shared library of plain C that knows nothing of Python or PyTorch. Without a compiler the package
installs without it and uses the plain-torch references.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/headway/kernels/native")


class BuildLibrary(build_ext):
    """Build a library without Python's ABI in its name, or none at all if that fails."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        # A library of an earlier build would pass for this one.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except Exception as error:
            reason = " ".join(str(error).split())[-100:]
            print(f"headway: native kernels not built, plain-torch references are used instead ({reason})")


class PlatformWheel(bdist_wheel):
    """A wheel for every Python of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "headway.kernels._native",
            sources=sorted(str(path) for path in NATIVE.glob("*.c")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-fopenmp-simd",
                "-ffp-contract=off",  # the same bits on every instruction set
                "-fno-math-errno",
                "-fno-trapping-math",
            ],
            libraries=["m"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
