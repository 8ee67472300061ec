"""The Python front end: capture, recording, analysis and the command line."""
