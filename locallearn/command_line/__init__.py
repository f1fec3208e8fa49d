"""``locallearn stages``, ``plan`` and ``check``: where a backbone can be cut, how, and whether its gradients are right."""

from locallearn.command_line.program import main

__all__ = ["main"]
