"""User stacks of code without frame pointers, unwound outside the kernel by the rules of .eh_frame.

The input is what a sampler copies: the registers and the top of the stack. Nothing here reads a live process,
needs root or loads bcc. :mod:`code` alone knows files; all else is arrays.
"""
