"""The page in the browser: runs, live curves, samples, votes, the next cycle; and the same pages as files."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # names of this machine, which no other reaches
