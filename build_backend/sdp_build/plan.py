"""Which commands make an extension. Functions from sources and tools to command lines, so they can be tested anywhere.

Every ``csrc/cpu/<op>.cpp`` is compiled once per SIMD level, ``csrc/cpu/library.cpp`` and every ``csrc/cuda/*.cu`` once.
The libraries are linked against empty stand-ins that only carry the names of torch's libraries: at run time
``import torch`` has loaded the real ones, and to build, neither the same version of torch nor a CUDA build is needed.
"""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .settings import gencode_flags
from .toolchain import Tool
from .torch_headers import TorchHeaders

# The oldest torch (2.11) and the oldest Python (3.11) that the libraries run with; newer names are then not declared.
TARGET = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030B0000"]
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
]
# GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for mistakes.
GCC_FLAGS = ["-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
# Levels 1 and 2 are entered only on a processor that has all of these (library.cpp asks cpuid); never -march=native.
X86_LEVELS = [
    [],
    ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    [
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mbmi2",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ],
]
LEVEL_NAMES = ["baseline", "avx2", "avx512"]
TORCH_LIBRARIES = {"_C": ["torch_cpu", "c10"], "_C_cuda": ["torch_cuda", "torch_cpu", "c10"]}


@dataclass(frozen=True)
class Step:
    """One command: what it makes, from what; ``depfile`` is where the compiler lists the headers it read."""

    output: Path
    inputs: tuple[Path, ...]
    command: tuple[str, ...]
    text: str
    depfile: Path | None = None


@dataclass(frozen=True)
class Plan:
    """All steps of one extension, in an order in which they can run; the last one makes ``output``."""

    name: str
    steps: tuple[Step, ...]
    output: Path
    facts: dict[str, object]  # what goes into the report and, as SDP_BUILD_INFO, into the library itself


def simd_levels(machine: str | None = None) -> list[list[str]]:
    """Compiler flags of each SIMD level that this kind of processor gets."""
    machine = platform.machine() if machine is None else machine
    return X86_LEVELS if machine.lower() in ("x86_64", "amd64") else X86_LEVELS[:1]


def sources_of(root: Path, name: str) -> list[Path]:
    """The source files of extension ``_C`` or ``_C_cuda``, sorted; empty where there are none."""
    return sorted((root / "csrc/cpu").glob("*.cpp") if name == "_C" else (root / "csrc/cuda").glob("*.cu"))


def plan_extension(
    name: str,
    root: Path,
    work: Path,
    *,
    cxx: Tool,
    nvcc: Tool | None,
    torch: TorchHeaders,
    python_include: Path,
    arch_list: tuple[str, ...] = (),
    schema_hash: str,
    commit: str | None = None,
    env: Mapping[str, str] | None = None,
    machine: str | None = None,
) -> Plan:
    """Plan ``_C``, or ``_C_cuda`` (which needs ``nvcc``), from ``root``/csrc with everything made under ``work``."""
    env = {} if env is None else env
    levels = simd_levels(machine)
    includes = [f"-I{root / 'csrc'}", "-isystem", str(torch.include), "-isystem", str(python_include)]
    header = work / "build_info.h"
    if name == "_C":
        base = [*cxx.command, *CXX_FLAGS, *([] if "clang" in cxx.version else GCC_FLAGS)]
        extra = shlex.split(env.get("CXXFLAGS", ""))
        variants = list(enumerate(levels))
    else:
        base = [*nvcc.command, *NVCC_FLAGS, *gencode_flags(arch_list)]
        extra = _host_compiler(env)
        variants = [(None, [])]
    common = [*TARGET, f"-DSDP_LEVELS={len(levels)}"]

    facts: dict[str, object] = {
        "compiler": cxx.version if name == "_C" else f"{nvcc.version}, host compiler {cxx.version}",
        "flags": [*base[len(cxx.command) if name == "_C" else 1 :], *extra, *common],
        "arch_list": LEVEL_NAMES[: len(levels)] if name == "_C" else list(arch_list),
        "torch_headers": torch.version,
        "schema_hash": schema_hash,
        "commit": commit,
    }
    write_if_changed(header, _info_header(facts))

    objects = [
        _compile(base, extra, [*common, *flags], includes, source, work, level, header)
        for source in sources_of(root, name)
        for level, flags in (variants if source.stem != "library" else [(None, [])])
    ]
    stubs = [_stub(cxx, library, work) for library in TORCH_LIBRARIES[name]]
    link = _link(name, cxx, nvcc, env, work, [step.output for step in objects], [step.output for step in stubs])
    # Backwards, since the longest to compile come last by name: started first, they leave no core idle at the end.
    return Plan(name, (*stubs, *reversed(objects), link), link.output, facts)


def _compile(base, extra, defines, includes, source: Path, work: Path, level: int | None, header: Path) -> Step:
    stem = source.stem if level is None else f"{source.stem}.{LEVEL_NAMES[level]}"
    output = work / f"{stem}.o"
    depfile = output.with_suffix(".d")
    inputs = [source]
    command = [*base, *defines]
    if level is not None:
        command.append(f"-DSDP_LEVEL={level}")
    if source.stem == "library":
        # A header of macros instead of -D: quotes inside -D do not survive nvcc on their way to the host compiler.
        command += ["-include", str(header)]
        inputs.append(header)
    command += [*includes, *extra, "-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
    return Step(
        output,
        tuple(inputs),
        tuple(command),
        f"compile {source.name}" + (f" ({LEVEL_NAMES[level]})" if level is not None else ""),
        depfile,
    )


def _stub(cxx: Tool, library: str, work: Path) -> Step:
    source = work / "stub.cpp"
    write_if_changed(source, 'extern "C" void sdp_kernels_stub() {}\n')
    output = work / f"lib{library}.so"
    command = [*cxx.command, "-shared", "-fPIC", f"-Wl,-soname,lib{library}.so", "-o", str(output), str(source)]
    return Step(output, (source,), tuple(command), f"stand-in for {output.name}")


def _link(name, cxx: Tool, nvcc: Tool | None, env, work: Path, objects: list[Path], stubs: list[Path]) -> Step:
    output = work / f"{name}.abi3.so"
    files = [*map(str, [*objects, *stubs])]
    # The stand-ins define nothing, so a linker left to itself may drop them; but their names are to be recorded.
    if name == "_C":
        flags = shlex.split(env.get("LDFLAGS", ""))
        command = [*cxx.command, "-shared", "-Wl,--no-as-needed", "-o", str(output), *files, *flags]
    else:
        # nvcc knows where its own static runtime is. It stays hidden inside: torch may have loaded another libcudart.
        command = [*nvcc.command, *_host_compiler(env), "-shared", "-cudart=static", "-Xcompiler=-fPIC"]
        # By way of -Xcompiler, since nvcc puts what -Xlinker says behind the files, where it comes too late for them.
        command += [r"-Xcompiler=-Wl\,--no-as-needed", "-Xlinker=--exclude-libs,ALL", "-o", str(output), *files]
    return Step(output, (*objects, *stubs), tuple(command), f"link {output.name}")


def _host_compiler(env: Mapping[str, str]) -> list[str]:
    # nvcc finds a host compiler itself; one that the user named wins, unless a launcher (ccache, say) comes before it.
    words = shlex.split(env.get("CXX", ""))
    return ["-ccbin", words[0]] if len(words) == 1 else []


def _info_header(facts: Mapping[str, object]) -> str:
    info = json.dumps(json.dumps(facts, sort_keys=True))  # a JSON text, quoted once more as a C string literal
    return f'#pragma once\n#define SDP_SCHEMA_HASH "{facts["schema_hash"]}"\n#define SDP_BUILD_INFO {info}\n'


def write_if_changed(path: Path, text: str) -> None:
    """Write a generated file only when its text differs, so that an unchanged one causes no recompilation."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
