"""Kernels compiled without a GPU, and what their machine code shows.

`python -m chanopt.kernels.aot` compiles every config that the tuner may pick, for sm_80 and sm_90, and checks each:
sums stay in registers, tensor cores are used, and memory moves 16 bytes at a time. It needs the triton wheel (whose
ptxas and cuobjdump it runs), about a second a kernel, and no driver.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chanopt.kernels.call import KernelError
from chanopt.kernels.configs import Config, fits, listed
from chanopt.kernels.emit import emit, load, name_of
from chanopt.kernels.launch import absent, constants
from chanopt.kernels.problem import Kind, Problem

ARCHITECTURES = (80, 90)
# Stack that ptxas reserves for what it does not spill; from here on it is spilling.
_STACK = 0
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_MMA = ("HGMMA", "HMMA", "FFMA")


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a compiled kernel's machine code shows.

    Attributes:
        registers: a thread.
        stack: bytes a thread, where it spills to.
        shared: bytes a program.
        loop: how often each instruction stands in the main loop (the smallest that multiplies).
        whole: how often it stands in the kernel.
    """

    registers: int
    stack: int
    shared: int
    loop: Counter[str]
    whole: Counter[str]

    def count(self, start: str, end: str = "", loop: bool = False) -> int:
        """Instructions whose name starts so and holds `end` further on."""
        counts = self.loop if loop else self.whole
        return sum(n for name, n in counts.items() if name.startswith(start) and end in name)


def compile_kernel(problem: Problem, config: Config, architecture: int, directory: Path | None = None) -> Any:
    """Triton's compiled kernel for an architecture (90 is sm_90).

    Args:
        problem: what to specialise on.
        config: the tile.
        architecture: compute capability, 80 for 8.0.
        directory: compile the emitted source, written there, in place of the parametrised kernel.

    Raises:
        KernelError: triton is not installed.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise KernelError("expected triton to compile kernels with; install it (Linux only)") from error
    kernel, values = _kernel(problem, config, directory)
    types = _types(problem)
    signature = {name: "constexpr" if name in values else types[name] for name in kernel.arg_names}
    # What the JIT finds out at run time: memory that torch allocated starts at a multiple of 16 bytes.
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    made = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(made, target=GPUTarget("cuda", architecture, 32), options=options)


def ptx(compiled: Any, name: str) -> str:
    """A kernel's PTX without what depends on where its source stands: comments, lines, names of the function."""
    text = re.sub(r"\.section\s+\.debug.*", "", compiled.asm["ptx"], flags=re.DOTALL)
    text = re.sub(r"//[^\n]*|\.loc[^\n]*|\.file[^\n]*", "", text).replace(name, "kernel")
    text = re.sub(r"\$L__tmp\d+:", "", text)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def metrics(compiled: Any) -> Metrics:
    """Disassemble a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _run([str(tool), "-sass", file.name])
        usage = _USAGE.search(_run([str(tool), "-res-usage", file.name]))
    assert usage is not None
    instructions = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(text)]
    return Metrics(
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=compiled.metadata.shared,
        loop=Counter(name for _, name, _ in main_loop(instructions)),
        whole=Counter(name for _, name, _ in instructions),
    )


def main_loop(instructions: Sequence[tuple[int, str, str]]) -> Sequence[tuple[int, str, str]]:
    """The shortest backward branch's body that multiplies; empty if none does."""
    place = {address: i for i, (address, _, _) in enumerate(instructions)}
    found: Sequence[tuple[int, str, str]] = []
    for i, (address, name, rest) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        start = int(target[1], 16) if target else address
        if start >= address or start not in place:
            continue
        body = instructions[place[start] : i + 1]
        if any(n.startswith(_MMA) for _, n, _ in body) and (not found or len(body) < len(found)):
            found = body
    return found


def faults(problem: Problem, config: Config, architecture: int, found: Metrics) -> list[str]:
    """What is wrong with a compiled kernel; empty if it is right."""
    wrong: list[str] = []
    if found.stack > _STACK or found.count("STL") or found.count("LDL"):
        wrong.append(f"spills: {found.stack} bytes of stack, {found.count('STL')} stores to it")
    if not found.count("STG", "128"):
        wrong.append("no 16-byte stores of the result")
    narrow = [name for name in found.whole if name.startswith("STG") and "128" not in name]
    if narrow:
        wrong.append(f"narrow stores: {', '.join(narrow)}")
    return wrong + (_depthwise_faults if problem.kind is Kind.DEPTHWISE else _conv_faults)(
        problem, config, architecture, found
    )


def _depthwise_faults(problem: Problem, config: Config, architecture: int, found: Metrics) -> list[str]:
    taps = problem.kernel[0] * problem.kernel[1]
    wide = found.count("LDG.", "128")
    return [] if wide >= taps else [f"{wide} 16-byte loads for {taps} taps on sm_{architecture}, tile {config}"]


def _conv_faults(problem: Problem, config: Config, architecture: int, found: Metrics) -> list[str]:
    wrong: list[str] = []
    tensor = "HGMMA" if architecture >= 90 and config.block_m >= 64 else "HMMA"
    if (problem.dtype != "fp32" or problem.precision == "tf32") and not found.count(tensor, loop=True):
        wrong.append(f"no {tensor} in the main loop")
    # Every byte of both operands: 16 bytes a thread and load.
    threads = 32 * config.warps
    needed = (config.block_m + config.block_n) * config.block_k * problem.itemsize // (16 * threads)
    if found.count("LDGSTS", "128", loop=True) < needed:
        wrong.append(f"{found.count('LDGSTS', '128', loop=True)} asynchronous 16-byte loads a step, not {needed}")
    # The prologue's vectors are float32 and one number a thread.
    vectors = 2 * -(-config.block_k // threads) if problem.affine else 0
    narrow = {n: found.loop[n] for n in found.loop if n.startswith("LDGSTS") and "128" not in n}
    if sum(narrow.values()) > vectors or found.count("LDG.", "U16", loop=True):
        wrong.append(f"narrow loads in the main loop: {narrow}")
    return wrong


def problems() -> Iterator[Problem]:
    """One problem for every shape of code that the tuner may meet: kernels, dtypes, prologues, epilogues."""
    large = Problem(Kind.CONV, "fp16", batch=64, height=56, width=56, gathered=256, outputs=256)
    shapes = [
        large,
        replace(large, stride=(2, 2)),
        replace(large, kernel=(3, 3), padding=(1, 1)),
        replace(large, kind=Kind.POINT, group=1),
    ]
    # SiLU stands for the activations that need an exponential, the costliest.
    flags: list[dict[str, Any]] = [
        {"act": "relu"},
        {"act": "silu", "residual": "add"},
        {"act": "silu", "residual": "accumulate"},
        {"act": "silu", "affine": True, "pre_act": "relu"},
    ]
    for dtype, group in (("fp16", 8), ("bf16", 8), ("fp32", 4)):
        for shape in shapes:
            for flag in flags:
                yield replace(shape, dtype=dtype, group=min(shape.group, group), **flag)
        depthwise = replace(large, kind=Kind.DEPTHWISE, dtype=dtype, group=group, padding=(1, 1), kernel=(3, 3))
        yield replace(depthwise, act="silu")
        yield replace(depthwise, kernel=(5, 5), padding=(2, 2), act="silu", residual="add")
        yield replace(depthwise, affine=True, pre_act="relu", act="silu", residual="accumulate")


def _kernel(problem: Problem, config: Config, directory: Path | None) -> tuple[Any, dict[str, Any]]:
    """(kernel, its compile-time arguments)."""
    if directory is not None:
        return load(emit(problem, config, directory), name_of(problem, config)), {}
    from chanopt.kernels import triton_conv

    values = constants(problem, config) | dict.fromkeys(absent(problem))
    return triton_conv.KERNELS[problem.kind.value], values


def _types(problem: Problem) -> dict[str, str]:
    from chanopt.kernels import triton_conv

    types = dict.fromkeys(triton_conv.SIZES[problem.kind.value], "i32")
    types |= dict.fromkeys(triton_conv.POINTERS, f"*{problem.dtype}")
    return types | dict.fromkeys(("bias_ptr", "scale_ptr", "shift_ptr"), "*fp32") | {"groups_ptr": "*i32"}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and check; the exit code says whether all are right."""
    parser = argparse.ArgumentParser(prog="python -m chanopt.kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), help="80 for sm_80")
    parser.add_argument("--match", default="", help="only kernels whose name matches this expression")
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth kernel")
    parser.add_argument("--all-configs", action="store_true", help="those that are pruned as well")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    jobs = [
        (problem, config, architecture)
        for architecture in options.arch
        for problem in problems()
        for config in listed(problem)
        if options.all_configs or fits(problem, config, architecture)
        if re.search(options.match, name_of(problem, config))
    ][:: options.every]
    rows = [_row(*job) for job in jobs]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    bad = sum(bool(row["faults"]) for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} kernels are right")
    return 1 if bad else 0


def _row(problem: Problem, config: Config, architecture: int) -> dict[str, Any]:
    found = metrics(compile_kernel(problem, config, architecture))
    wrong = faults(problem, config, architecture, found)
    name = f"{name_of(problem, config)} w{config.warps} s{config.stages}"
    loop = sum(found.loop.values())
    line = f"sm_{architecture} {name}: {found.registers} registers, {loop} in the loop, {found.shared} B shared"
    print(("BAD " if wrong else "ok  ") + line + "".join(f"; {fault}" for fault in wrong), flush=True)
    return {
        "architecture": architecture,
        "kernel": name,
        "registers": found.registers,
        "stack": found.stack,
        "shared": found.shared,
        "loop": loop,
        "faults": wrong,
    }


if __name__ == "__main__":
    sys.exit(main())
