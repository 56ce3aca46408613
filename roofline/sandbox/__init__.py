"""Work on untrusted input, in a process that can be killed.

`process` is the process and the way to call it; the other modules are what it runs: plain functions
from JSON to JSON. They import errors and the library they are for, so that it starts at once.
"""

from roofline.sandbox.process import Sandbox

__all__ = ["Sandbox"]
