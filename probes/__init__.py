"""BPF programs (C) and the catalogue of what can be traced."""
