"""What a pass over a graph returns besides the graph: whether anything changed, and notes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PassResult:
    """What a pass did. `modified` is False where the graph came back as it was; `notes` are for the report."""

    modified: bool = False
    notes: tuple[str, ...] = ()
