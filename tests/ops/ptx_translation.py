"""Translate PTX into C++ for the emulator of csrc, so that the tests run what nvcc made of the kernels.

Each PTX instruction becomes one C++ statement, each register an element of an array, and each label a label. Only the
instructions that nvcc emits for these kernels are known; another one is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_DECLARED = {"pred": "bool", "f32": "float", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t"}
_TYPES = {
    "pred": "bool", "f32": "float", "u8": "uint8_t",
    "b16": "uint16_t", "u16": "uint16_t", "s16": "int16_t",
    "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t",
    "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t",
}  # fmt: skip
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # unsigned
_BINARY = {"add": "+", "sub": "-", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}
_SPECIAL = {"%tid.x": "uint32_t(thread_number())"}
_SPECIAL |= {f"%ctaid.{axis}": f"uint32_t(block_{axis}())" for axis in "xyz"}
# A product of a warpgroup. The predicate in its scope says that it adds to what the sums hold.
_GROUP_PRODUCT = re.compile(r"\{\s*\.reg \.pred adds;\s*setp\.ne\.b32 adds, 1, 0;\s*(wgmma[^;]*;)\s*\}")
_ASSERTION = re.compile(r"\{\s*\.reg \.b32 temp_param_reg;.*?call\.uni\s*__assertfail.*?\}", re.DOTALL)


class UnknownInstructionError(ValueError):
    """PTX has an instruction that the translation does not know."""


def translate(ptx: str) -> str:
    """Return C++ with a function for each kernel, and a table of them.

    Raises:
        UnknownInstructionError: An instruction or an operand is unknown; the message has its text.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    found = re.findall(r"\.visible \.entry (\S+)\((.*?)\).*?\n\{(.*?)\n\}", text, re.DOTALL)
    functions = [_Kernel(name, number).translate(body) for number, (name, _, body) in enumerate(found)]
    table = "".join(f'  {{"{name}", kernel_{number}}},\n' for number, (name, *_) in enumerate(found))
    entries = f"namespace {{\nconst NamedKernel kernels[] = {{\n{table}  {{nullptr, nullptr}}}};\n}}\n"
    return "\n".join(['#include "ptx_runtime.h"', *functions, entries])


class _Kernel:
    def __init__(self, name: str, number: int) -> None:
        self._name, self._number = name, number

    def translate(self, body: str) -> str:
        body = _GROUP_PRODUCT.sub(r"\1", _ASSERTION.sub("assertion_failed;", body))
        registers = re.findall(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>", body)
        lines = [f"  {_DECLARED[kind]} {name}[{count}] = {{}};" for kind, name, count in registers]
        body = re.sub(r"\.(?:reg|pragma|loc|shared|local) [^;]*;", "", body)
        for part in re.split(r"(\$L__BB\d+_\d+:)|;", body):
            statement = " ".join((part or "").split())
            if statement:
                lines.append(self._statement(statement))
        return f"static void kernel_{self._number}(const uint8_t* params) {{\n" + "\n".join(lines) + "\n}"

    def _statement(self, statement: str) -> str:
        if statement.startswith("$L__BB"):
            return f"L{statement[1:-1]}: ;"
        if statement == "assertion_failed":
            return '  simt::fail("device assertion");'
        guard, rest = re.fullmatch(r"(?:@(!?%p\d+) )?(.*)", statement).groups()  # type: ignore[union-attr]
        opcode, _, arguments = rest.partition(" ")
        words = opcode.split(".")
        try:
            code = self._instruction(opcode, words, _split(arguments))
        except (KeyError, IndexError, ValueError) as error:
            raise UnknownInstructionError(f"{statement} ({error!r})") from error
        condition = "" if guard is None else f"if ({'!' * guard.startswith('!')}{self._operand(guard.lstrip('!'))}) "
        return f"  {condition}{{ {code}; }}"

    def _instruction(self, opcode: str, words: Sequence[str], given: Sequence[str]) -> str:
        name, kind = words[0], words[-1]
        if name == "bra":
            return f"goto L{given[0][1:]}"
        if name in ("ret", "trap"):
            return "return" if name == "ret" else 'simt::fail("device assertion")'
        if name in ("bar", "barrier"):
            return "barrier(__FILE__, __LINE__)"
        for table in (self._memory, self._warp, self._warpgroup):
            code = table(opcode, words, given)
            if code is not None:
                return code
        value = self._value(opcode, words, kind, given)
        if given[0].startswith("{"):  # two halves of a word
            low, high = self._operands(given[0])
            return f"const uint32_t word = {value}; {low} = uint16_t(word); {high} = uint16_t(word >> 16)"
        return f"{self._operand(given[0])} = {value}"

    def _value(self, opcode: str, words: Sequence[str], kind: str, given: Sequence[str]) -> str:
        """Return the expression of an instruction that computes one register from others."""
        name = words[0]
        if name in ("mov", "cvta"):
            return self._moved(given)
        x = [self._operand(word) for word in given[1:]]
        if name == "cvt":
            return self._converted(opcode, words, x)
        if name == "setp":
            return self._compared(words, kind, x)
        cast = _TYPES[kind]
        simple: dict[str, Callable[[], str]] = {
            "mad": lambda: f"uint32_t({x[0]}) * uint32_t({x[1]}) + uint32_t({x[2]})",
            "neg": lambda: f"-{cast}({x[0]})",
            "not": lambda: f"{'!' if kind == 'pred' else '~'}{x[0]}",
            "selp": lambda: f"{x[2]} ? {x[0]} : {x[1]}",
            "bfi": lambda: f"insert_bits({', '.join(x)})",
            "fma": lambda: f"std::fma({', '.join(x)})",
            "ex2": lambda: f"std::exp2({x[0]})",
            "lg2": lambda: f"std::log2({x[0]})",
            "rcp": lambda: f"1.0f / {x[0]}",
        }
        if name in simple:
            return simple[name]()
        if name == "mul":
            return _product(words, kind, x)
        if name in ("min", "max"):
            if kind == "f32":
                return f"std::f{name}({x[0]}, {x[1]})"
            return f"{cast}({x[0]}) {'<' if name == 'min' else '>'} {cast}({x[1]}) ? {cast}({x[0]}) : {cast}({x[1]})"
        if name in ("shl", "shr"):
            return f"{cast}({x[0]}) {_BINARY[name]} {x[1]}"
        if name in ("add", "sub") and kind[0] == "s":
            cast = f"u{cast}"  # wraps, which C++ leaves open for signed numbers
        return f"{cast}({x[0]}) {_BINARY[name]} {cast}({x[1]})"

    def _moved(self, given: Sequence[str]) -> str:
        target, source = given
        if source.startswith("{"):
            low, high = self._operands(source)
            return f"uint32_t({low}) | uint32_t({high}) << 16"
        value = self._operand(source)
        is_word, is_float = (re.match(r"%(r|f)\d", word) for word in (target, source))
        if is_word and is_float and is_word[1] != is_float[1]:
            return f"as_bits({value})" if is_word[1] == "r" else f"as_float({value})"
        return value

    def _converted(self, opcode: str, words: Sequence[str], x: Sequence[str]) -> str:
        if "bf16x2" in words or "f16x2" in words:
            return f"pack<Type::{'kBFloat16' if 'bf16x2' in words else 'kFloat16'}>({x[1]}, {x[0]})"
        if opcode == "cvt.f32.f16":
            return f"unpack<Type::kFloat16>({x[0]})"
        return f"{_TYPES[words[-2]]}({_TYPES[words[-1]]}({x[0]}))"

    def _compared(self, words: Sequence[str], kind: str, x: Sequence[str]) -> str:
        comparison = words[1]
        unordered = kind == "f32" and comparison.endswith("u")
        found = f"{_TYPES[kind]}({x[0]}) {_COMPARISONS[comparison.removesuffix('u')]} {_TYPES[kind]}({x[1]})"
        if unordered:
            found = f"({found} || std::isnan({x[0]}) || std::isnan({x[1]}))"
        if len(words) == 4:
            return f"({found}) {'&&' if words[2] == 'and' else '||'} {x[2]}"
        return found

    def _memory(self, opcode: str, words: Sequence[str], given: Sequence[str]) -> str | None:
        """Return the statement of an instruction that reads or writes memory, or None for others."""
        name, kind = words[0], words[-1]
        if name in ("ld", "st"):
            is_load = name == "ld"
            registers = self._operands(given[0 if is_load else 1])
            address, size = self._address(given[1 if is_load else 0]), len(registers)
            if words[1] == "shared":
                bytes_each = {"b16": 2, "u16": 2, "b32": 4, "u32": 4, "f32": 4}[kind]
                place = f"static_cast<{_TYPES[kind]}*>(shared_at({address}, {bytes_each * size}))"
            elif words[1] in ("global", "param"):
                place = f"global_at<{_TYPES[kind]}>({address}{f', {size}' if size > 1 else ''})"
            else:
                raise ValueError(words[1])
            pairs = enumerate(registers)
            moves = [f"{r} = at[{i}]" if is_load else f"at[{i}] = {_TYPES[kind]}({r})" for i, r in pairs]
            if words[:2] == ["st", "shared"]:
                moves.append(f"note_store({address}, {bytes_each * size})")
            return f"auto* at = {place}; " + "; ".join(moves)
        if name in ("atom", "red"):
            address, value = (self._address(given[-2]), self._operand(given[-1]))
            return f"{'lower' if 'min' in words else 'raise'}({address}, {value})"
        if opcode.startswith("cp.async.cg"):
            shared, source, size, read = given
            valid = f"{self._operand(read)} == {size}"
            place = f"shared_at({self._address(shared)}, {size})"
            return f"copy_16_async({place}, reinterpret_cast<const void*>({self._address(source)}), {valid})"
        if opcode.startswith("cp.async.commit"):
            return "commit_copies()"
        if opcode.startswith("cp.async.wait"):
            return f"wait_for_copies({given[0]}, __FILE__, __LINE__)"
        if name == "ldmatrix":
            function = "load_matrices_transposed" if "trans" in words else "load_matrices"
            place = f"static_cast<const uint16_t*>(shared_at({self._address(given[1])}, 16))"
            moves = "; ".join(f"{register} = loaded[{i}]" for i, register in enumerate(self._operands(given[0])))
            return f"uint32_t loaded[4]; {function}(loaded, {place}); {moves}"
        return None

    def _warp(self, opcode: str, words: Sequence[str], given: Sequence[str]) -> str | None:
        """Return the statement of an instruction of a whole warp, or None for others."""
        name = words[0]
        if name == "shfl":
            if "bfly" not in words:
                raise ValueError("only bfly")
            target, *x = (self._operand(word.partition("|")[0]) for word in given)
            return f"{target} = exchange_lanes({', '.join(x)})"
        if name == "vote":
            return f"{self._operand(given[0])} = any_lane({self._operand(given[1])})"
        if name == "redux":
            function = "smallest_lane" if "min" in words else "largest_lane"
            return f"{self._operand(given[0])} = {function}(int({self._operand(given[1])}))"
        if name == "mma":
            d, a, b, c = (self._operands(group) for group in given)
            kind = "kBFloat16" if "bf16" in words else "kFloat16"
            moves = "; ".join(f"{register} = sum[{i}]" for i, register in enumerate(d))
            left = f"const uint32_t left[4] = {{{', '.join(a)}}}"
            return (
                f"float sum[4] = {{{', '.join(c)}}}; {left}; multiply<Type::{kind}>(sum, left, {', '.join(b)}); {moves}"
            )
        return None

    def _warpgroup(self, opcode: str, words: Sequence[str], given: Sequence[str]) -> str | None:
        """Return the statement of an instruction of a warpgroup, or None for others."""
        simple = {
            "fence.proxy.async.shared::cta": "publish",
            "wgmma.fence.sync.aligned": "start_products",
            "wgmma.commit_group.sync.aligned": "commit_products",
            "wgmma.wait_group.sync.aligned": "finish_products",
        }
        if opcode in simple:
            if given not in ([], ["0"]):
                raise ValueError("a wait that leaves groups")
            return f"{simple[opcode]}(__FILE__, __LINE__)"
        if not opcode.startswith("wgmma.mma_async.sync.aligned.m64n"):
            return None
        sums, left, right, adds, *signs = given
        shape = re.fullmatch(r"m64n(\d+)k16", words[4])
        registers = ", ".join(f"&{register}" for register in self._operands(sums))
        if shape is None or int(shape[1]) != 2 * len(self._operands(sums)) or [adds, *signs[:2]] != ["adds", "1", "1"]:
            raise ValueError("another product of a warpgroup")
        kind = "kBFloat16" if "bf16" in words else "kFloat16"
        begin = f"float* const sums[] = {{{registers}}}; "
        operand = self._operand(left) if not left.startswith("{") else "left"
        if operand == "left":
            begin += f"const uint32_t left[4] = {{{', '.join(self._operands(left))}}}; "
        return (
            f"{begin}multiply_group_of<Type::{kind}>(sums, {operand}, {self._operand(right)}, {', '.join(signs[2:])})"
        )

    def _operand(self, word: str) -> str:
        if register := re.fullmatch(r"%(p|r|rd|f|rs)(\d+)", word):
            return f"{register[1]}[{register[2]}]"
        if word in _SPECIAL:
            return _SPECIAL[word]
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", word):
            return f"as_float(0x{word[2:]}u)"
        if re.fullmatch(r"-?\d+", word):
            return f"{word}ll" if abs(int(word)) >= 2**31 else word
        if re.fullmatch(r"0x[0-9a-fA-F]+", word):
            return word
        if word == f"{self._name}_param_0":
            return "reinterpret_cast<uint64_t>(params)"
        if "memory" in word or word.startswith(("$str", "__unnamed")):
            return "0"  # where the dynamic shared memory starts, or the text of an assertion
        raise ValueError(word)

    def _operands(self, group: str) -> list[str]:
        return [self._operand(word.strip()) for word in group.strip("{}").split(",")]

    def _address(self, word: str) -> str:
        base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(\+-?\d+)?\s*\]", word).groups()  # type: ignore[union-attr]
        return f"{self._operand(base)} {offset or ''}".strip()


def _product(words: Sequence[str], kind: str, x: Sequence[str]) -> str:
    if kind == "f32":
        return f"{x[0]} * {x[1]}"
    cast = _TYPES[kind]
    if "hi" in words and kind.endswith("64"):
        return f"uint64_t((__int128({cast}({x[0]})) * {cast}({x[1]})) >> 64)"
    if "wide" in words or "hi" in words:
        wide = cast.replace("32", "64")
        product = f"{wide}({cast}({x[0]})) * {wide}({cast}({x[1]}))"
        return product if "wide" in words else f"uint32_t(({product}) >> 32)"
    unsigned = cast if cast.startswith("u") else f"u{cast}"
    return f"{unsigned}({x[0]}) * {unsigned}({x[1]})"


def _split(arguments: str) -> list[str]:
    """Split operands at commas outside of braces and brackets."""
    return [word.strip() for word in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", arguments) if word.strip()]
