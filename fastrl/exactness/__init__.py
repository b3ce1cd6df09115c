"""Exact mode: a row has the same bits in rollout, scoring and update, whatever runs beside it.

settings.py says what is set and why, rows.py how many rows a product needs and who makes it.
"""

from fastrl.exactness.rows import (
    choose_products,
    invariant_rows,
    multiplies_by_input,
    row_multiple,
)
from fastrl.exactness.settings import exact_math, set_workspaces

__all__ = ["choose_products", "exact_math", "invariant_rows", "multiplies_by_input",
           "row_multiple", "set_workspaces"]
