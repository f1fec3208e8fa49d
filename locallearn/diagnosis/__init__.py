"""Looks at a wrapper from outside: what a step of it takes, and where."""

from locallearn.diagnosis.memory import MemoryReport, memory_report

__all__ = ["MemoryReport", "memory_report"]
