"""The contract that every backend keeps, as a suite to run on any machine; see docs/parity.md.

A client of the public interface: a stranger's backend can be tried by it.
"""

from kvcore.parity.cases import CASES
from kvcore.parity.found import Case, Found
from kvcore.parity.runner import Result, run, select_cases, try_case
from kvcore.parity.subject import Subject

__all__ = ["CASES", "Case", "Found", "Result", "Subject", "run", "select_cases", "try_case"]
