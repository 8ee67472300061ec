"""The parts of ``stallscope watch`` that need no kernel: triggers, pre-roll, captures, metrics, commands."""
