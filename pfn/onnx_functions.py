"""What ONNX lacks: the inverse of a symmetric positive definite matrix, from products.

Gauss-Jordan elimination by blocks. Each step inverts the first diagonal block, pivot by pivot,
eliminates it from the rest, and rotates the matrix by one block, so that the next is first; after
as many steps as there are blocks all are in place again. It needs no pivoting, for each diagonal
block is then the Schur complement of those before it.

Read `export.py` first. This module is a graph in Python's syntax: onnxscript compiles it.

Reference: Golub and Van Loan, Matrix Computations, section 3.4 on elimination, 4.2 on why positive
definite matrices need no pivoting.
"""

# mypy: ignore-errors

from onnxscript import DOUBLE, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

BLOCK = 16
END = 2**63 - 1


@script(Opset("pfn", 1))
def spd_inverse(matrix: DOUBLE["g", "n", "n"]) -> tuple[DOUBLE["g", "n", "n"], DOUBLE["g", 1]]:  # noqa: F821
    """The inverse (g, n, n) and the logarithm of the determinant (g, 1)."""
    rows_columns = op.Constant(value_ints=[1, 2])
    first, second = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    corner = op.Constant(value_ints=[0, 0])
    block_ends = op.Constant(value_ints=[BLOCK, BLOCK])
    n = op.Shape(matrix, start=1, end=2)
    steps = op.Div(n + op.Constant(value_ints=[BLOCK - 1]), op.Constant(value_ints=[BLOCK]))
    size = steps * op.Constant(value_ints=[BLOCK])
    padding = op.Concat(corner, first, first, size - n, size - n, axis=0)
    index = op.Range(op.Constant(value_int=0), op.Squeeze(size), op.Constant(value_int=1))
    diagonal = op.Equal(op.Unsqueeze(index, first), op.Unsqueeze(index, second))
    beyond = op.Unsqueeze(op.GreaterOrEqual(index, n), first)
    m = op.Pad(matrix, padding) + op.CastLike(op.And(diagonal, beyond), matrix)
    start = op.Slice(m, corner, op.Constant(value_ints=[1, 1]), rows_columns)
    log_determinant = op.Squeeze(start - start, second)
    for _step in range(op.Squeeze(steps)):
        pivot = op.Slice(m, corner, block_ends, rows_columns)
        for _pivot in range(BLOCK):
            p = op.Slice(pivot, corner, op.Constant(value_ints=[1, 1]), rows_columns)
            row = op.Slice(
                pivot,
                op.Constant(value_ints=[0, 1]),
                op.Constant(value_ints=[1, BLOCK]),
                rows_columns,
            )
            column = op.Slice(
                pivot,
                op.Constant(value_ints=[1, 0]),
                op.Constant(value_ints=[BLOCK, 1]),
                rows_columns,
            )
            rest = op.Slice(pivot, op.Constant(value_ints=[1, 1]), block_ends, rows_columns)
            log_determinant = log_determinant + op.Squeeze(op.Log(p), second)
            upper = op.Concat(rest - column * (row / p), op.Neg(column / p), axis=2)
            pivot = op.Concat(upper, op.Concat(row / p, op.Reciprocal(p), axis=2), axis=1)
        rows = op.Slice(
            m,
            op.Constant(value_ints=[0, BLOCK]),
            op.Constant(value_ints=[BLOCK, END]),
            rows_columns,
        )
        columns = op.Slice(
            m,
            op.Constant(value_ints=[BLOCK, 0]),
            op.Constant(value_ints=[END, BLOCK]),
            rows_columns,
        )
        others = op.Slice(
            m,
            op.Constant(value_ints=[BLOCK, BLOCK]),
            op.Constant(value_ints=[END, END]),
            rows_columns,
        )
        solved = op.MatMul(pivot, rows)
        upper = op.Concat(
            others - op.MatMul(columns, solved), op.Neg(op.MatMul(columns, pivot)), axis=2
        )
        m = op.Concat(upper, op.Concat(solved, pivot, axis=2), axis=1)
    return op.Slice(m, corner, op.Concat(n, n, axis=0), rows_columns), log_determinant
