"""Torch's symbolic sizes as dimensions of the IR: renamed, and written with `+ - * // % max min` only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsec.ir.types import Dim, Sym

if TYPE_CHECKING:
    import sympy
    import torch

_SUM, _PRODUCT, _ATOM = 1, 2, 3  # how tightly a piece of text binds


class Symbols:
    """Names for the symbols of one graph: `s0, s1 ...` in order of first appearance, `u0 ...` for sizes of results."""

    def __init__(self) -> None:
        self.names: dict[sympy.Symbol, str] = {}

    def dim(self, size: int | torch.SymInt) -> Dim:
        """A size as a dimension. Raises: ValueError for an expression that the IR cannot write."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr.is_Integer:
            return int(expr)
        return Sym(self._text(expr, _SUM))

    def _name(self, symbol: sympy.Symbol) -> str:
        if symbol not in self.names:
            from torch.utils._sympy.symbol import SymT, symbol_is_type

            letter = "u" if symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)) else "s"
            taken = sum(name.startswith(letter) for name in self.names.values())
            self.names[symbol] = f"{letter}{taken}"
        return self.names[symbol]

    def _text(self, expr: Any, around: int) -> str:
        """`expr` as text, in brackets if it binds less tightly than what stands around it."""
        text, binds = self._write(expr)
        return f"({text})" if binds < around else text

    def _write(self, expr: Any) -> tuple[str, int]:
        import sympy

        args = expr.args
        match type(expr).__name__:
            case "Symbol":
                return self._name(expr), _ATOM
            case "Add":
                return self._sum(expr), _SUM
            case "Mul":
                return self._product(expr)
            case "Pow" | "PowByNatural" if args[1].is_Integer and int(args[1]) > 0:
                return "*".join([self._text(args[0], _ATOM)] * int(args[1])), _PRODUCT
            case "FloorDiv" | "CleanDiv" | "IntTrueDiv":
                return f"{self._text(args[0], _PRODUCT)}//{self._text(args[1], _ATOM)}", _PRODUCT
            case "CeilDiv":
                return f"({self._text(args[0] + args[1] - 1, _SUM)})//{self._text(args[1], _ATOM)}", _PRODUCT
            case "Mod" | "PythonMod":
                return f"{self._text(args[0], _ATOM)}%{self._text(args[1], _ATOM)}", _PRODUCT
            case "ModularIndexing":
                base, divisor, modulus = (self._text(arg, _ATOM) for arg in args)
                return f"({base}//{divisor})%{modulus}", _PRODUCT
            case "Max" | "Min" as name:
                return f"{name.lower()}({','.join(sorted(self._text(arg, _SUM) for arg in args))})", _ATOM
            case "Identity":
                return self._write(args[0])
            case "CeilToInt" | "FloorToInt" | "TruncToInt" as name if (ratio := _ratio(args[0])) is not None:
                above, below = ratio
                above = above + below - 1 if name == "CeilToInt" else above
                if below == 1:
                    return self._write(above)
                return f"{self._text(above, _ATOM)}//{self._text(below, _ATOM)}", _PRODUCT
            case _ if isinstance(expr, sympy.Integer):
                return str(int(expr)), _ATOM if int(expr) >= 0 else _SUM
            case _:
                raise ValueError(f"size {expr} is no expression of + - * // % max min")

    def _sum(self, expr: Any) -> str:
        """Positive terms first, the constant last: `s0+1`, `s1-s0`."""
        terms = list[tuple[bool, bool, str]]()
        for term in expr.args:
            negative = term.could_extract_minus_sign()
            text = self._text(-term if negative else term, _PRODUCT)
            terms.append((negative, term.is_Integer, text))
        terms.sort()
        text = "".join(("-" if negative else "+") + text for negative, _, text in terms)
        return text.removeprefix("+")

    def _product(self, expr: Any) -> tuple[str, int]:
        coefficient, rest = expr.as_coeff_Mul()
        factors = sorted(
            self._text(factor, _PRODUCT if factor.is_Pow else _ATOM) for factor in rest.as_ordered_factors()
        )
        numerator, denominator = int(coefficient.p), int(coefficient.q)
        if abs(numerator) != 1:
            factors.insert(0, str(abs(numerator)))
        text = "*".join(factors)
        if denominator != 1:
            text = f"({text})//{denominator}"
        return (f"-{text}", _SUM) if numerator < 0 else (text, _PRODUCT)


def _ratio(expr: Any) -> tuple[Any, Any] | None:
    """A float expression over sizes as a numerator and a denominator, where rounding to a float changes no digit."""
    import sympy

    match type(expr).__name__:
        case "ToFloat":
            return expr.args[0], sympy.Integer(1)
        case "IntTrueDiv" if expr.args[1].is_Integer:
            return expr.args
        case "FloatTrueDiv" if (above := _ratio(expr.args[0])) and (below := _ratio(expr.args[1])):
            exact = _is_power_of_two(above[1]) and below[1] == 1 and below[0].is_Integer
            return (above[0], above[1] * below[0]) if exact else None
        case "Float":
            above, below = (sympy.Integer(part) for part in float(expr).as_integer_ratio())
            return (above, below) if below <= 2**20 else None
        case "Mul" | "FloatMul" if len(expr.args) == 2:
            parts = [_ratio(arg) for arg in expr.args]
            if any(part is None or not _is_power_of_two(part[1]) for part in parts):
                return None
            (above, below), (other_above, other_below) = (part for part in parts if part is not None)
            return above * other_above, below * other_below
        case _:
            return None


def _is_power_of_two(number: Any) -> bool:
    return bool(number.is_Integer) and int(number) > 0 and int(number) & (int(number) - 1) == 0
