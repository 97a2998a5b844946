"""The inner loops of trellis codes on the CPU, in vectors of sixteen lanes: the sixteen rows of a tile at once.

numba compiles them. A loop over lanes it would turn into vectors of 64-bit integers, or into none, so the instructions are
given: a vector of sixteen numbers is one register with AVX-512, two with AVX2, four with NEON; LLVM divides it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from .code import SIDE
from .tables import CENTRE, FACTOR


@cache
def decode_tile(bits: int, state_bits: int) -> Any:
    """A function for compiled code: write the 256 values of a tile, column by column.

    Args of the function:
        words: uint16 array of all tiles.
        at: int, of the tile's first word.
        unit: float32, what sums of bytes are multiplied by.
        values: contiguous float32 array to fill.
        to: int, the place in it of the 16 rows' values in the first column.
        step: int, from the values of a column to those of the next one.
    """
    ir: Any = import_module("llvmlite.ir")
    types: Any = import_module("numba.core.types")
    extending: Any = import_module("numba.extending")

    @extending.intrinsic
    def decode(_typing: Any, words: Any, at: Any, unit: Any, values: Any, to: Any, step: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            lanes = _Lanes(ir, context, builder)
            start = builder.gep(lanes.data(signature.args[0], given[0]), [given[1]])
            fresh = [
                builder.zext(lanes.load(builder.gep(start, [lanes.index(SIDE * word)]), lanes.shorts, align=1), lanes.integers)
                for word in range(bits)
            ]
            # behind a row's last word comes the first one of the row before it
            before = builder.shuffle_vector(
                fresh[0], fresh[0], ir.Constant(lanes.integers, [(row - 1) % SIDE for row in range(SIDE)])
            )
            pairs = [
                builder.or_(word, builder.shl(after, lanes.constant(16)))
                for word, after in zip(fresh, [*fresh[1:], before], strict=True)
            ]
            into = builder.gep(lanes.data(signature.args[3], given[3]), [given[4]])
            scale = lanes.spread(given[2], lanes.floats)
            for column in range(SIDE):
                word, shift = divmod((SIDE - 1 - column) * bits, 16)
                state = builder.and_(builder.lshr(pairs[word], lanes.constant(shift)), lanes.constant((1 << state_bits) - 1))
                mixed = builder.mul(state, lanes.constant(FACTOR))
                # two sums of two bytes side by side, then one
                odd = builder.and_(builder.lshr(mixed, lanes.constant(8)), lanes.constant(0x00FF00FF))
                both = builder.add(builder.and_(mixed, lanes.constant(0x00FF00FF)), odd)
                total = builder.add(builder.and_(both, lanes.constant(0xFFFF)), builder.lshr(both, lanes.constant(16)))
                value = builder.fmul(builder.sitofp(builder.sub(total, lanes.constant(CENTRE)), lanes.floats), scale)
                lanes.store(value, builder.gep(into, [builder.mul(given[5], lanes.index(column))]))
            return context.get_dummy_value()

        return types.void(words, types.intp, types.float32, values, types.intp, types.intp), generate

    return decode


@cache
def add_products() -> Any:
    """A function for compiled code: add the products of a tile's 16 rows with 16 inputs to 16 sums.

    Args of the function:
        values: (256,) float32, as `decode_tile` writes them with a step of 16.
        x: float32 array of inputs.
        at: int, of the first of the 16 inputs.
        sums: float32 array.
        to: int, of the first of the 16 sums.
    """
    ir: Any = import_module("llvmlite.ir")
    types: Any = import_module("numba.core.types")
    extending: Any = import_module("numba.extending")

    @extending.intrinsic
    def add(_typing: Any, values: Any, x: Any, at: Any, sums: Any, to: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            lanes = _Lanes(ir, context, builder)
            tile, inputs = (
                lanes.data(signature.args[0], given[0]),
                builder.gep(lanes.data(signature.args[1], given[1]), [given[2]]),
            )
            place = builder.gep(lanes.data(signature.args[3], given[3]), [given[4]])
            # four chains of additions, because each one waits for the last
            parts = [lanes.load(place, lanes.floats)] + [ir.Constant(lanes.floats, [0.0] * SIDE)] * 3
            for column in range(SIDE):
                value = lanes.load(builder.gep(tile, [lanes.index(SIDE * column)]), lanes.floats)
                one = lanes.spread(builder.load(builder.gep(inputs, [lanes.index(column)])), lanes.floats)
                product = builder.fmul(value, one, flags=("contract",))
                parts[column % 4] = builder.fadd(parts[column % 4], product, flags=("contract",))
            total = builder.fadd(builder.fadd(parts[0], parts[1]), builder.fadd(parts[2], parts[3]))
            lanes.store(total, place)
            return context.get_dummy_value()

        return types.void(values, x, types.intp, sums, types.intp), generate

    return add


class _Lanes:
    """Vectors of sixteen lanes in LLVM's language."""

    def __init__(self, ir: Any, context: Any, builder: Any) -> None:
        self._ir, self._context, self._builder = ir, context, builder
        self.shorts, self.integers, self.floats = (
            ir.VectorType(kind, SIDE) for kind in (ir.IntType(16), ir.IntType(32), ir.FloatType())
        )

    def data(self, kind: Any, array: Any) -> Any:
        """The pointer to the first element of an array."""
        return self._context.make_array(kind)(self._context, self._builder, array).data

    def index(self, number: int) -> Any:
        return self._ir.Constant(self._ir.IntType(64), number)

    def constant(self, number: int) -> Any:
        return self._ir.Constant(self.integers, [number] * SIDE)

    def spread(self, number: Any, kind: Any) -> Any:
        """The same number in all lanes."""
        none = self._ir.Constant(kind, self._ir.Undefined)
        first = self._builder.insert_element(none, number, self._ir.Constant(self._ir.IntType(32), 0))
        return self._builder.shuffle_vector(first, none, self.constant(0))

    def load(self, pointer: Any, kind: Any, align: int = 4) -> Any:
        return self._builder.load(self._builder.bitcast(pointer, kind.as_pointer()), align=align)

    def store(self, vector: Any, pointer: Any) -> None:
        self._builder.store(vector, self._builder.bitcast(pointer, vector.type.as_pointer()), align=4)
