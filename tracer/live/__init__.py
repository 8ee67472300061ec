"""The last seconds of a session, kept in memory that does not grow: no root, no bcc, no pandas, no printing."""
