"""Stallscope: find the call that blocked Redis while the kernel refused connections."""

from importlib.metadata import version

__version__ = version("stallscope")
