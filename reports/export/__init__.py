"""Other ways out of a recording: one exporter per format, all listed in :mod:`formats`."""
