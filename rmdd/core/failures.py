"""Tell failures that the same run would repeat from those that may not happen again, such as a lack of memory."""


class MustChange(RuntimeError):
    """A failure that the same run would repeat: values of the run file or the data must change first."""


def may_pass(error: Exception) -> bool:
    """Return whether the same work may succeed after `error`, once its cause is gone: a full disk, a lost worker."""
    return isinstance(error, RuntimeError | OSError | MemoryError) and not isinstance(error, MustChange)
