"""The exceptions of the machine; ``str()`` is the one line to print: what failed, on what, the remedy."""


class MachineError(Exception):
    """The image cannot be built, or a run cannot be started, for a reason the user can act on."""


class DidNotComeUpError(MachineError):
    """qemu ran, but no command was run to its end in it.

    Attributes:
        console: The last lines of the guest kernel's console.
    """

    def __init__(self, message: str, console: str = "") -> None:
        super().__init__(message)
        self.console = console
