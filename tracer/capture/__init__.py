"""Everything that touches a live process or kernel; the only package that imports bcc."""
