"""The rules that turn a recording into findings: a name, a remedy and a small function each."""

from __future__ import annotations

from stallscope.tracer.analysis.rules import listener, recording, redis, samples
from stallscope.tracer.analysis.rules.rule import Rule

RULES: tuple[Rule, ...] = (*redis.RULES, *samples.RULES, *listener.RULES, *recording.RULES)
"""All of them; findings of one weight keep this order."""
