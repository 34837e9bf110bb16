"""A mixed-integer program, built row by row and solved by HiGHS."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


class IntegerProgram:
    """A mixed-integer program, built row by row."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.integer: list[int] = []
        self.rows: list[tuple[list[int], list[float], float, float]] = []

    def variable(self, cost: float = 0.0, integer: bool = False) -> int:
        self.cost.append(cost)
        self.integer.append(int(integer))
        return len(self.cost) - 1

    def row(self, columns: list[int], values: list[float], low: float, high: float) -> None:
        self.rows.append((columns, values, low, high))

    def solve(self) -> np.ndarray | None:
        values = [v for r in self.rows for v in r[1]]
        columns = [c for r in self.rows for c in r[0]]
        starts = np.cumsum([0, *(len(r[0]) for r in self.rows)])
        matrix = csr_array((values, columns, starts), shape=(len(self.rows), len(self.cost)))
        limits = LinearConstraint(matrix, [r[2] for r in self.rows], [r[3] for r in self.rows])
        scale = max(1.0, max(map(abs, self.cost), default=1.0)) / 1e6
        # Solved to the end, for what is small counts as well; of choices that cost the same, those that are listed first.
        first = np.arange(len(self.cost)) * (1e-4 / max(1, len(self.cost)))
        result = milp(
            np.array(self.cost) / scale + first,
            constraints=limits,
            integrality=np.array(self.integer),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        return result.x if result.status == 0 else None
