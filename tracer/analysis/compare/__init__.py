"""Two sides of recordings compared: what changed, by how much, and whether that may be chance.

From the ground up: ``sides`` cuts recordings into time blocks, ``events`` says what counts as one event, ``rates``
has the exact Poisson intervals and tests, ``blocks`` the bootstrap and the permutations over time blocks,
``comparable`` says what must not be compared, ``comparison`` is ``stallscope diff``, ``limits``, ``checks`` and
``verify`` are ``stallscope verify``, ``plan`` says how long to record.
"""
