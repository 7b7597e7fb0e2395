"""The errors that omforge raises on purpose: each says what, why and what next."""


class OmforgeError(Exception):
    """Base of all deliberate errors; `exit_status` is what the command line returns for it.

    Args:
        what: What happened, naming the file, node or value.
        why: The constraint that failed, with both sides where there are two.
        next_step: What the user can do about it.
    """

    exit_status = 1

    def __init__(self, what: str, why: str = "", next_step: str = "") -> None:
        self.what = what
        self.why = why
        self.next_step = next_step
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.what}: {self.why}" if self.why else self.what
        return f"{text}. {self.next_step}" if self.next_step else text


class InputError(OmforgeError):
    """The input or the usage is wrong (a missing file, a truncated model, an unknown target)."""

    exit_status = 2


class CheckError(OmforgeError):
    """A check failed: a verifier, legality, coverage or numeric comparison said no."""

    exit_status = 1
