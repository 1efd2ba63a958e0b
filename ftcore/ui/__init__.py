"""The page in the browser: runs, live curves, samples, votes, the next cycle; and the same pages as files."""
