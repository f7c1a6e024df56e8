"""What is done to a document's text.  A rule either changes a text or drops the document; both are counted.

Each rule first looks whether it has anything to do: most documents pass untouched.
"""

import re
from dataclasses import dataclass, field

from corpora.settings import Clean

# C0 and C1 control characters, DEL; tab and newline stay, CR is the other rule's.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A text after cleaning; `dropped` names the rule that dropped it, `changed` those that altered it."""

    text: str
    changed: list[str] = field(default_factory=list)
    dropped: str | None = None


def clean(text: str, rules: Clean) -> Cleaned:
    """Apply the rules in their fixed order: newlines, control characters, length."""
    changed = []
    if rules.newlines and "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        changed.append("newlines")
    if rules.control_characters and _CONTROL.search(text):
        text = _CONTROL.sub("", text)
        changed.append("control characters")
    stripped = len(text.strip())
    dropped = "empty" if not stripped else "too short" if stripped < rules.min_chars else None
    return Cleaned(text, changed, dropped)
