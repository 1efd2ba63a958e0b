"""Many runs from one command: grid, TPE, their pool and report."""
