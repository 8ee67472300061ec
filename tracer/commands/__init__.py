"""The commands, one module each: parse, call one function, print what it returns. No logic lives here."""
