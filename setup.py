"""Builds libkvcore (the C core, one shared library) and the Cython extensions that link to it.

Everything declarative is in pyproject.toml. What is here needs code: the attention kernels are one
text compiled once per instruction set, each with its own flags, so that one build runs on every CPU
of its architecture and picks at load time.

Environment: KVCORE_WERROR=1 makes the core's compiler warnings errors. KVCORE_WITHOUT_ISAS names
instruction sets that are left out, such as "avx512,avx512_bf16".
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

PACKAGE = Path("src/kvcore")
CORE = PACKAGE / "core"
INCLUDE = PACKAGE / "include"
NATIVE = PACKAGE / "_native"

CFLAGS = ["-O3", "-std=c11", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# Cython's output is not ours to make free of warnings.
CYTHON_CFLAGS = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unused-function"]
if os.environ.get("KVCORE_WERROR"):
    CFLAGS.append("-Werror")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_VNNI = [*AVX512, "-mavx512vnni", "-mavx512vbmi"]
ISA_CFLAGS = {
    "isa_avx2": AVX2,
    "isa_avx512": AVX512,
    "isa_avx512_vnni": AVX512_VNNI,
    "isa_avx512_bf16": [*AVX512_VNNI, "-mavx512bf16"],
}
WITHOUT = [name for name in os.environ.get("KVCORE_WITHOUT_ISAS", "").split(",") if name]
X86 = platform.machine().lower() in {"x86_64", "amd64"}
MACOS = sys.platform == "darwin"
LIBRARY = "libkvcore.dylib" if MACOS else "libkvcore.so"


class BuildExt(build_ext):
    """Builds the shared core first, then the extensions against it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()
        if self.editable_mode:
            # pip offers temporary folders; where `build_ext` keeps its own, nothing is made twice.
            suffix = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_lib, self.build_temp = f"build/lib.{suffix}", f"build/temp.{suffix}"

    def run(self) -> None:
        require_python_headers()
        self.library_dir = Path("src" if self.inplace else self.build_lib) / "kvcore" / "lib"
        for extension in self.extensions:
            extension.library_dirs.append(str(self.library_dir))
        super().run()

    def build_extensions(self) -> None:
        self.build_core()
        super().build_extensions()

    def build_core(self) -> None:
        sources = sorted([*CORE.glob("*.c"), *(CORE / "kernels").glob("*.c")])
        sources = [source for source in sources if source.stem not in {f"isa_{n}" for n in WITHOUT}]
        target = self.library_dir / LIBRARY
        if not self.must_build(target, sources):
            return
        with ThreadPoolExecutor(self.parallel) as pool:
            objects = list(pool.map(self.compile_source, sources))
        self.library_dir.mkdir(parents=True, exist_ok=True)
        soname = ["-install_name", f"@rpath/{LIBRARY}"] if MACOS else [f"-Wl,-soname,{LIBRARY}"]
        # Linked beside its place and moved over it: a running process keeps the library it mapped.
        fresh = target.with_suffix(".new")
        self.compiler.link_shared_object(
            objects, str(fresh), libraries=["m"], extra_postargs=["-pthread", *soname]
        )
        fresh.replace(target)

    def compile_source(self, source: Path) -> str:
        """The object of one source, compiled only when something that it depends on is newer."""
        [obj] = self.compiler.object_filenames([str(source)], output_dir=self.build_temp)
        if self.must_build(Path(obj), [source]):
            isa_flags = ISA_CFLAGS.get(source.stem, []) if X86 else []
            self.compiler.compile(
                [str(source)],
                output_dir=self.build_temp,
                include_dirs=[str(INCLUDE), str(INCLUDE / "kvcore"), str(CORE)],
                macros=[
                    ("KVCORE_VERSION", f'"{self.distribution.get_version()}"'),
                    *((f"KV_WITHOUT_{name.upper()}", None) for name in WITHOUT),
                ],
                extra_postargs=[*CFLAGS, *isa_flags, "-pthread"],
            )
        return obj

    def must_build(self, target: Path, sources: list[Path]) -> bool:
        headers = [*CORE.rglob("*.h"), *INCLUDE.rglob("*.h")]
        depends = [*sources, *headers, Path("setup.py"), Path("pyproject.toml")]
        return bool(self.force) or is_older(target, depends)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self.library_dir / LIBRARY)]


class BuildCore(BuildExt):
    """Builds the shared core alone: what the sanitizers look at."""

    def build_extensions(self) -> None:
        self.build_core()


def is_older(target: Path, depends: list[Path]) -> bool:
    """Whether a file is missing, or older than one of those that it depends on."""
    return bool(newer_group([str(path) for path in depends], str(target)))


def require_python_headers() -> None:
    folders = [sysconfig.get_path("include"), *os.environ.get("CPATH", "").split(os.pathsep)]
    if not any(folder and Path(folder, "Python.h").exists() for folder in folders):
        sys.exit(
            "error: Python.h is not installed, and the extensions cannot be compiled without it; "
            "on Debian and Ubuntu: apt-get install python3-dev"
        )


def extensions() -> list[Extension]:
    pyx = sorted(NATIVE.glob("*.pyx"))
    depends = [*NATIVE.glob("*.pxd"), *INCLUDE.rglob("*.h"), Path("setup.py")]
    # Asked here, because Cython asks NumPy's files too, and they are new in every isolated build.
    stale = [path for path in pyx if is_older(path.with_suffix(".c"), [path, *depends])]
    if stale:
        translate(stale)
    return [extension(path, depends) for path in pyx]


def translate(pyx: list[Path]) -> None:
    from Cython.Build import cythonize

    directives = {
        "language_level": 3,
        "boundscheck": False,
        "wraparound": False,
        "cdivision": True,
        "freethreading_compatible": False,
        "binding": True,
        "embedsignature": True,
    }
    cythonize(
        [str(path) for path in pyx],
        include_path=["src"],
        compiler_directives=directives,
        force=True,
        quiet=True,
    )


def extension(pyx: Path, depends: list[Path]) -> Extension:
    origin = "@loader_path" if MACOS else "$ORIGIN"
    return Extension(
        f"kvcore._native.{pyx.stem}",
        [str(pyx.with_suffix(".c"))],
        include_dirs=[str(INCLUDE), numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
        libraries=["kvcore"],
        library_dirs=[],
        extra_compile_args=CYTHON_CFLAGS,
        extra_link_args=[f"-Wl,-rpath,{origin}/../lib"],
        depends=[str(path) for path in depends],
    )


setup(ext_modules=extensions(), cmdclass={"build_core": BuildCore, "build_ext": BuildExt})
