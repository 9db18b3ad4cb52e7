"""Which variant of a kernel runs at which token count, as one line of text: "1=rows1.split4;64=rows2.split1"."""

import functools
import re
from collections.abc import Mapping

from sparsify_compiler.errors import KernelError

_ENTRY = re.compile(r"(\d+)=([\w.\-]*)")


def write_variants(chosen: Mapping[int, str]) -> str:
    """Write the variant chosen for each token count: "" where no entry has a name.

    Beside named entries one without a name ("1=;64=rows2") says that the kernel chooses at those counts.
    """
    if not any(chosen.values()):
        return ""
    return ";".join(f"{tokens}={name}" for tokens, name in sorted(chosen.items()))


@functools.lru_cache(maxsize=1024)
def read_variants(text: str) -> tuple[tuple[int, str], ...]:
    """Read what `write_variants` wrote, by ascending token count.

    Raises:
        KernelError: the text is not of that form.
    """
    entries = []
    for part in filter(None, text.split(";")):
        match = _ENTRY.fullmatch(part)
        if match is None:
            raise KernelError(f"kernel variants {text!r}: {part!r} is not <tokens>=<name>; compile the model again")
        entries.append((int(match[1]), match[2]))
    return tuple(sorted(entries))


@functools.lru_cache(maxsize=65536)
def variant_for(text: str, tokens: int) -> str:
    """Return the variant for `tokens` rows: that of the next larger count measured, else of the largest; "" if none."""
    entries = read_variants(text)
    for measured, name in entries:
        if tokens <= measured:
            return name
    return entries[-1][1] if entries else ""
