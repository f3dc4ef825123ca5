"""What schemathesis loads before it runs: files of forms are made of text.

It otherwise makes them of bytes and sometimes stops with "Unsupported type: 'Binary'" while it
checks them (version 4.32). `bench.hostile` itself sends files of all kinds.
"""

import schemathesis
from hypothesis import strategies

schemathesis.openapi.format("binary", strategies.text())
