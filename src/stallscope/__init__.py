"""Stallscope: find the call that blocked Redis while the kernel refused connections."""

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Return the installed version when ``__version__`` is asked for; reading it costs 30 ms."""
    if name == "__version__":
        from importlib.metadata import version

        return version("stallscope")
    raise AttributeError(name)
