"""What every test may rely on."""

from __future__ import annotations

import signal

from hypothesis import settings

# A shell starts its background jobs with SIGINT ignored, and so would be all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
